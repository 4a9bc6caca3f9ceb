"""frame_attention: projections moved to the queries change nothing, and its kernel in Triton."""

from __future__ import annotations

import pytest
import torch

from sparqle_kernels.frame_attention import (
    fold_keys,
    frame_attention,
    reference,
    unfold_values,
)
from sparqle_kernels.query_attention import query_attention
from tests.kernels.exactness import assert_as_exact_as_pytorch

# (B, H, Q, L, W): single entries; heads and queries that fill no tile; more rows than one; shipped
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 3, 17, 65), (1, 5, 7, 63, 16), (1, 8, 4, 33, 512)]


def inputs(shape, dtype=torch.float32, share=0.5):
    """q, frames, age, seen, bias, scale; what no query sees is NaN."""
    b, h, n_queries, length, width = shape
    gen = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(b, h, n_queries, width, generator=gen).to(dtype)
    frames = torch.randn(b, length, width, generator=gen).to(dtype)
    age = torch.randint(0, 9, (b, n_queries, length), generator=gen)
    seen = torch.rand(b, n_queries, length, generator=gen) < share
    seen[:, :, 0] |= ~seen.any(dim=2)
    frames.masked_fill_(~seen.any(dim=1)[:, :, None], torch.nan)
    bias = torch.randn(h, 9, generator=gen).to(dtype)
    return q, frames, age, seen, bias, width**-0.5


def truth(q, frames, age, seen, bias, scale):
    """Query by query in float64, over the frames it sees and no others."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(len(q)):
        for i in range(q.shape[2]):
            at = seen[b if len(seen) > 1 else 0, i].nonzero()[:, 0]
            own = frames[b, at].double()
            ages = age[b if len(age) > 1 else 0, i, at]
            scores = q[b, :, i].double() @ own.T * scale + bias[:, ages].double()
            out[b, :, i] = scores.softmax(dim=-1) @ own
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_by_its_definition(shape):
    args = inputs(shape, torch.float64)
    torch.testing.assert_close(frame_attention(*args), truth(*args), atol=1e-12, rtol=0)


def test_projections_move_to_the_queries_and_change_nothing():
    """Against query_attention over projected frames: biases, heads, masks and all."""
    _, frames, age, seen, bias, _ = inputs((2, 2, 3, 9, 8), torch.float64)
    gen = torch.Generator().manual_seed(1)
    q = torch.randn(2, 2, 3, 4, generator=gen, dtype=torch.float64)
    w_key, w_value = torch.randn(2, 8, 8, generator=gen, dtype=torch.float64)
    b_value = torch.randn(8, generator=gen, dtype=torch.float64)

    def heads(x):
        return x.view(2, 9, 2, 4).transpose(1, 2)

    k, v = heads(frames @ w_key.T), heads(frames @ w_value.T + b_value)
    expected = query_attention(q, k, v, age, seen, bias)
    mixed = frame_attention(fold_keys(q, w_key), frames, age, seen, bias, 4**-0.5)
    got = unfold_values(mixed, w_value, b_value)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(place, shape, dtype):
    place.wants(dtype)
    from sparqle_kernels.frame_attention import triton

    args = inputs(shape, dtype)
    out = triton.frame_attention(*place.put(*args[:5]), args[5])
    assert_as_exact_as_pytorch(out, reference.frame_attention(*args), truth(*args))


def test_triton_with_one_mask_for_all_rows(place):
    from sparqle_kernels.frame_attention import triton

    q, frames, age, seen, bias, scale = inputs((3, 2, 2, 5, 4), share=1.0)
    args = (q, frames, age[:1], seen[:1], bias)
    out = triton.frame_attention(*place.put(*args), scale)
    pytorch = reference.frame_attention(*args, scale)
    assert_as_exact_as_pytorch(out, pytorch, truth(*args, scale))
