"""chunk_attention against its definition in float64, with a ring full of NaN where it may be."""

from __future__ import annotations

import pytest
import torch

from sparqle_kernels.chunk_attention import Ring, chunk_attention
from sparqle_kernels.chunk_attention.reference import chunk_attention as reference

# (B, H, T, L, d): the shipped shape, single entries, nothing round, a chunk longer than the ring.
SHAPES = [
    (2, 8, 16, 256, 64),
    (1, 1, 1, 1, 1),
    (3, 2, 5, 7, 3),
    (1, 3, 63, 15, 17),
    (2, 1, 4, 1, 8),
    (1, 2, 64, 33, 96),
]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def flat(op):
    """The op with its ring spread out: q, k, v, ring_k, ring_v, ring_position, length, rows."""

    def call(q, k, v, ring_k, ring_v, position, length=None, rows=None):
        return op(q, k, v, Ring(ring_k, ring_v, position, rows), length)

    return call


# What the package chooses here, and the reference where that is not the same function.
IMPLEMENTATIONS = {flat(chunk_attention): "chosen", flat(reference): "reference"}
by_implementation = pytest.mark.parametrize("op", IMPLEMENTATIONS, ids=IMPLEMENTATIONS.values())


def inputs(shape, filled, dtype=torch.float32, seed=0):
    """q, k, v, ring_k, ring_v, ring_position; `filled` of the ring is written, the rest is NaN."""
    b, h, t, n_ring, d = shape
    gen = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, b, h, t, d, generator=gen).to(dtype)
    ring_k, ring_v = torch.randn(2, b, h, n_ring, d, generator=gen).to(dtype)
    age = torch.rand(b, n_ring, generator=gen).argsort(dim=1)  # no order in the ring
    written = age < round(filled * n_ring)
    position = torch.where(written, 1000 + age, -1)
    for ring in (ring_k, ring_v):
        ring.masked_fill_(~written[:, None, :, None], torch.nan)
    return q, k, v, ring_k, ring_v, position


def truth(q, k, v, ring_k, ring_v, position):
    """Softmax over what was written, row by row in float64; nothing else is touched."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(len(q)):
        written = position[b] >= 0
        keys = torch.cat([ring_k[b][:, written], k[b]], dim=1).double()
        values = torch.cat([ring_v[b][:, written], v[b]], dim=1).double()
        scores = q[b].double() @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
        out[b] = scores.softmax(dim=-1) @ values
    return out


@pytest.mark.usefixtures("poisoned")
@by_implementation
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("filled", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_definition(op, shape, filled, dtype):
    args = inputs(shape, filled, dtype)
    before = [x.clone() for x in args]
    out = op(*args)
    assert (out.shape, out.dtype) == (args[0].shape, dtype)
    error = (out.double() - truth(*args)).abs().max().item()
    assert error < TOLERANCES[dtype]
    for x, was in zip(args, before, strict=True):  # inputs are only read
        assert torch.equal(x.nan_to_num(7.0), was.nan_to_num(7.0))


@by_implementation
def test_the_first_frames_may_ask_alone(op):
    """What lies ahead is seen and does not ask: fewer queries than keys, of unequal lengths too."""
    q, k, v, *rings = inputs((2, 2, 9, 11, 8), 0.6, torch.float64)
    few = op(q[:, :, :5], k, v, *rings)
    torch.testing.assert_close(few, truth(q, k, v, *rings)[:, :, :5], atol=1e-12, rtol=0)
    length = torch.tensor([9, 3])
    torch.testing.assert_close(
        op(q[:, :, :5], k, v, *rings, length), op(q, k, v, *rings, length)[:, :, :5]
    )


@by_implementation
def test_rows_read_their_rings_where_they_lie(op):
    """Rings of five streams, of which three have a chunk; one of them twice, as padding is."""
    q, k, v, *rings = inputs((5, 2, 6, 11, 8), 0.6, torch.float64)
    rows = torch.tensor([3, 0, 4, 4])
    out = op(*(x[rows] for x in (q, k, v)), *rings, rows=rows)
    torch.testing.assert_close(out, truth(q, k, v, *rings)[rows], atol=1e-12, rtol=0)


@by_implementation
def test_the_order_in_the_ring_does_not_matter(op):
    args = inputs((2, 2, 6, 11, 8), 0.6, torch.float64)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    q, k, v, ring_k, ring_v, position = args
    turned = op(q, k, v, ring_k[:, :, order], ring_v[:, :, order], position[:, order])
    torch.testing.assert_close(turned, op(*args), atol=1e-12, rtol=0)


@by_implementation
def test_large_scores_do_not_overflow(op):
    q, k, v, ring_k, ring_v, position = inputs((1, 2, 4, 8, 16), 0.5)
    args = (q * 100, k * 100, v, ring_k * 100, ring_v, position)
    out = op(*args)
    assert (out.double() - truth(*args)).abs().max() < 1e-4


@by_implementation
def test_gradients(op):
    """Of the chunk's own tensors, past a ring with holes of NaN."""
    q, k, v, ring_k, ring_v, position = inputs((2, 2, 3, 5, 4), 0.6, torch.float64)
    own = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *chunk: op(*chunk, ring_k, ring_v, position), own)
