"""utterance_attention: masks of streaming over whole utterances, forward and gradients."""

from __future__ import annotations

import pytest
import torch

from sparqle_kernels.chunk_attention import Ring, chunk_attention
from sparqle_kernels.utterance_attention import reference, utterance_attention
from tests.kernels.exactness import assert_as_exact_as_pytorch

# ((B, H, T, d), chunk, left): one frame; full context; no left context; chunks that divide nothing;
# one below and one past a tile; more left context than frames
SHAPES = [
    ((1, 1, 1, 1), 1, 0),
    ((2, 2, 17, 3), 0, 0),
    ((1, 2, 63, 17), 16, 0),
    ((1, 1, 65, 64), 7, 20),
    ((1, 1, 130, 16), 16, 40),
    ((1, 1, 40, 8), 8, 1000),
]


def inputs(shape, dtype=torch.float32):
    """q, k, v and the gradient of the output; heads are cut out of (B, T, D) as in the encoder."""
    b, h, t, d = shape
    gen = torch.Generator().manual_seed(sum(shape))
    return list(torch.randn(4, b, t, h, d, generator=gen).to(dtype).transpose(2, 3))


def run(op, tensors, chunk, left):
    """The output and the gradients of q, k, v."""
    *qkv, d_out = (x.detach() for x in tensors)
    qkv = [x.requires_grad_() for x in qkv]
    out = op(*qkv, chunk, left)
    return [out, *torch.autograd.grad(out, qkv, d_out)]


def truth(tensors, chunk, left):
    """Softmax over the frames that the definition names, query by query, in float64."""
    *qkv, d_out = (x.detach().double() for x in tensors)
    q, k, v = (x.requires_grad_() for x in qkv)
    out = torch.zeros_like(q)
    for i in range(q.shape[2]):
        start = i // chunk * chunk if chunk else 0
        seen = slice(max(0, start - left) if chunk else 0, start + chunk if chunk else None)
        scores = q[:, :, i : i + 1] @ k[:, :, seen].transpose(2, 3) / q.shape[3] ** 0.5
        one = torch.zeros_like(q)
        one[:, :, i : i + 1] = 1.0
        out = out + one * (scores.softmax(dim=-1) @ v[:, :, seen])
    return [out, *torch.autograd.grad(out, (q, k, v), d_out)]


@pytest.mark.parametrize(("shape", "chunk", "left"), SHAPES, ids=str)
def test_the_reference_equals_its_definition(shape, chunk, left):
    tensors = inputs(shape, torch.float64)
    for got, expected in zip(
        run(utterance_attention, tensors, chunk, left), truth(tensors, chunk, left), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_it_equals_chunk_attention_over_chunks():
    """What training sees is what streaming computes, ring and all."""
    q, k, v, _ = inputs((2, 2, 24, 8))
    whole = utterance_attention(q, k, v, 4, 8)
    ring_k, ring_v = torch.zeros(2, 2, 2, 8, 8)
    position = torch.full((2, 8), -1)
    for start in range(0, 24, 4):
        now = slice(start, start + 4)
        part = chunk_attention(
            q[:, :, now], k[:, :, now], v[:, :, now], Ring(ring_k, ring_v, position)
        )
        torch.testing.assert_close(part, whole[:, :, now], atol=1e-6, rtol=0)
        at = torch.arange(start, start + 4) % 8
        ring_k[:, :, at], ring_v[:, :, at] = k[:, :, now], v[:, :, now]
        position[:, at] = torch.arange(start, start + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "chunk", "left"), SHAPES, ids=str)
def test_triton_and_its_gradients(place, shape, chunk, left, dtype):
    place.wants(dtype)
    from sparqle_kernels.utterance_attention import triton

    tensors = inputs(shape, dtype)
    got = run(triton.utterance_attention, place.put(*tensors), chunk, left)
    pytorch = run(reference.utterance_attention, tensors, chunk, left)
    for ours, theirs, exact in zip(got, pytorch, truth(tensors, chunk, left), strict=True):
        assert_as_exact_as_pytorch(ours, theirs, exact)


def test_triton_takes_any_layout(place):
    """Slices of one projection, and a gradient that is one number expanded."""
    from sparqle_kernels.utterance_attention import triton

    gen = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 2, 9, 24, generator=gen)
    tensors = [*qkv.split(8, dim=3), torch.ones(1).expand(1, 2, 9, 8)]
    got = run(triton.utterance_attention, place.put(*tensors), 4, 4)
    pytorch = run(reference.utterance_attention, tensors, 4, 4)
    for ours, theirs, exact in zip(got, pytorch, truth(tensors, 4, 4), strict=True):
        assert_as_exact_as_pytorch(ours, theirs, exact)
