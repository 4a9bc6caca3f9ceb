"""Attention kernels in Triton, forward: as exact as PyTorch over hostile shapes and rings."""

from __future__ import annotations

import pytest
import torch

from sparqle_kernels.chunk_attention import reference as chunk_reference
from sparqle_kernels.decode_attention import reference as decode_reference
from sparqle_kernels.query_attention import reference as query_reference
from tests.kernels import test_chunk_attention as chunk
from tests.kernels import test_decode_attention as decode
from tests.kernels import test_query_attention as query
from tests.kernels.exactness import assert_as_exact_as_pytorch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (B, H, T, L, d): one frame; odd everything; one below and one past a tile; T longer than the ring
CHUNK_SHAPES = [(1, 1, 1, 1, 1), (2, 2, 3, 7, 3), (1, 2, 17, 65, 64), (1, 1, 63, 15, 17)]
CHUNK_SHAPES += [(1, 1, 65, 130, 16)]
# (B, H, Q, L, d)
QUERY_SHAPES = [(1, 1, 1, 1, 1), (2, 2, 3, 65, 64), (1, 1, 17, 63, 17), (1, 1, 65, 129, 3)]
# (slots, rows of the batch, heads, kv heads, new rows, slot length, head width, keys of a split)
DECODE_SHAPES = [
    (1, 1, 1, 1, 1, 1, 8, 256),
    (3, 2, 9, 3, 1, 65, 64, 256),
    (3, 2, 6, 2, 4, 130, 17, 64),  # three splits, the last with two keys
    (2, 2, 4, 4, 8, 17, 3, 16),
    (2, 1, 3, 1, 25, 63, 16, 16),  # a prefix: more packed rows than one tile
]


@by_dtype
@pytest.mark.parametrize("filled", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", CHUNK_SHAPES, ids=str)
def test_chunk_attention(place, shape, filled, dtype):
    """Empty, holed and full rings in no order, as wrapped ones are; holes hold NaN."""
    place.wants(dtype)
    from sparqle_kernels.chunk_attention import triton

    args = chunk.inputs(shape, filled, dtype)
    out = chunk.flat(triton.chunk_attention)(*place.put(*args))
    pytorch = chunk.flat(chunk_reference.chunk_attention)(*args)
    assert_as_exact_as_pytorch(out, pytorch, chunk.truth(*args))


@by_dtype
def test_chunk_attention_of_unequal_and_inactive_rows(place, dtype):
    """Past a row's length lies NaN; a row of length 0 is NaN through and through, and gives 0."""
    place.wants(dtype)
    from sparqle_kernels.chunk_attention import triton

    q, k, v, ring_k, ring_v, position = chunk.inputs((4, 1, 17, 20, 8), 0.5, dtype)
    length = torch.tensor([17, 0, 1, 16])
    for row, n in enumerate(length.tolist()):
        for x in (q, k, v):
            x[row, :, n:] = torch.nan
    ring_k[1], ring_v[1], position[1] = torch.nan, torch.nan, 5
    args = (q, k, v, ring_k, ring_v, position, length)
    out = chunk.flat(triton.chunk_attention)(*place.put(*args)).cpu()
    pytorch = chunk.flat(chunk_reference.chunk_attention)(*args)
    for row, n in enumerate(length.tolist()):
        assert not out[row, :, n:].any()
        assert not pytorch[row, :, n:].any()
        if n:
            alone = [x[row : row + 1, :, :n] for x in (q, k, v)]
            alone += [x[row : row + 1] for x in (ring_k, ring_v, position)]
            expected = chunk.truth(*alone)
            got, theirs = out[row : row + 1, :, :n], pytorch[row : row + 1, :, :n]
            assert_as_exact_as_pytorch(got, theirs, expected)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_chunk_attention_reads_the_rings_of_its_rows(place, dtype):
    """Three rows of five streams, in no order, one of them not active: its ring is NaN."""
    from sparqle_kernels.chunk_attention import triton

    q, k, v, *rings = chunk.inputs((5, 2, 17, 20, 8), 0.5, dtype)
    rows, length = torch.tensor([3, 0, 4]), torch.tensor([17, 17, 0])
    for ring in rings[:2]:
        ring[4] = torch.nan
    own = [x[rows] for x in (q, k, v)]
    out = chunk.flat(triton.chunk_attention)(*place.put(*own, *rings, length, rows)).cpu()
    pytorch = chunk.flat(chunk_reference.chunk_attention)(*own, *rings, length, rows)
    expected = chunk.truth(*(x[rows[:2]] for x in (q, k, v, *rings)))
    assert_as_exact_as_pytorch(out[:2], pytorch[:2], expected)
    assert not out[2].any()
    assert not pytorch[2].any()


@pytest.mark.parametrize("n_asked", [1, 17, 33])
def test_chunk_attention_of_the_first_frames(place, n_asked):
    """What lies ahead is seen and does not ask; a row of two frames has fewer than ask."""
    from sparqle_kernels.chunk_attention import triton

    q, k, v, *rings = chunk.inputs((2, 2, 40, 20, 8), 0.5, torch.float32)
    args = (q[:, :, :n_asked], k, v, *rings)
    out = chunk.flat(triton.chunk_attention)(*place.put(*args))
    pytorch = chunk.flat(chunk_reference.chunk_attention)(*args)
    assert_as_exact_as_pytorch(out, pytorch, chunk.truth(q, k, v, *rings)[:, :, :n_asked])
    length = torch.tensor([40, 2])
    out = chunk.flat(triton.chunk_attention)(*place.put(*args, length))
    pytorch = chunk.flat(chunk_reference.chunk_attention)(*args, length)
    torch.testing.assert_close(out.cpu(), pytorch, atol=1e-5, rtol=1e-5)


def test_chunk_attention_takes_the_views_that_the_encoder_has(place):
    """Heads cut out of (B, T, D), a layer of (layers, B, H, L, d): strides, not copies."""
    from sparqle_kernels.chunk_attention import triton

    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 2, 16, generator=gen).transpose(2, 3)
    rings = torch.randn(2, 3, 2, 2, 9, 16, generator=gen)
    args = (q, k, v, rings[0, 1], rings[1, 1], torch.arange(18).view(2, 9))
    out = chunk.flat(triton.chunk_attention)(*place.put(*args))
    assert_as_exact_as_pytorch(
        out, chunk.flat(chunk_reference.chunk_attention)(*args), chunk.truth(*args)
    )
    assert out.transpose(1, 2).is_contiguous(), "merging the heads should be a view"


@by_dtype
@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("shape", QUERY_SHAPES, ids=str)
def test_query_attention(place, shape, share, dtype):
    place.wants(dtype)
    from sparqle_kernels.query_attention import triton

    args = query.inputs(shape, dtype, share)
    out = triton.query_attention(*place.put(*args))
    assert_as_exact_as_pytorch(out, query_reference.query_attention(*args), query.truth(*args))


def test_query_attention_with_one_mask_for_all_rows(place):
    from sparqle_kernels.query_attention import triton

    q, k, v, age, seen, bias = query.inputs((3, 1, 5, 9, 4), share=1.0)
    args = (q, k, v, age[:1], seen[:1], bias)
    out = triton.query_attention(*place.put(*args))
    assert_as_exact_as_pytorch(out, query_reference.query_attention(*args), query.truth(*args))


def slots_of(shape, dtype):
    """q, k, v, slots, lengths; beyond each length, and in slots of others, lies NaN."""
    n_slots, batch, n_heads, n_kv, n_rows, n_slot, width = shape
    gen = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(batch, n_heads, n_rows, width, generator=gen).to(dtype)
    k, v = torch.randn(2, n_slots, n_kv, n_slot, width, generator=gen).to(dtype)
    slots = torch.randperm(n_slots, generator=gen)[:batch]
    lengths = torch.randint(n_rows, n_slot + 1, (batch,), generator=gen)
    lengths[0] = n_slot
    nobody = torch.ones(n_slots, n_slot, dtype=torch.bool)
    for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
        nobody[slot, :length] = False
    for x in (k, v):
        x.masked_fill_(nobody[:, None, :, None], torch.nan)
    return q, k, v, slots, lengths


@by_dtype
@pytest.mark.parametrize("shape", DECODE_SHAPES, ids=str)
def test_decode_attention(place, shape, dtype):
    place.wants(dtype)
    from sparqle_kernels.decode_attention import triton

    *shape, split = shape
    q, k, v, slots, lengths = slots_of(shape, dtype)
    n_rows, n_groups = q.shape[2], q.shape[1] // k.shape[1]
    out = triton.Plan(*place.put(slots, lengths), n_rows, n_groups, split).attend(
        *place.put(q, k, v)
    )
    clean = decode_reference.Plan.of(slots, lengths, n_rows, n_groups)
    pytorch = clean.attend(q, k.nan_to_num(0.0), v.nan_to_num(0.0))
    assert_as_exact_as_pytorch(out, pytorch, decode.dense(q, k, v, slots, lengths))


def test_merging_splits_is_stable(place):
    """Scores of 1e4 in one split and -1e4 in another: no overflow, no weight for the small ones."""
    from sparqle_kernels.decode_attention import triton

    q = torch.ones(1, 1, 1, 16)
    k = torch.full((1, 1, 48, 16), -100.0)
    k[:, :, 20] = 100.0
    v = torch.arange(48.0)[None, None, :, None].expand(1, 1, 48, 16).contiguous()
    plan = triton.Plan(*place.put(torch.tensor([0]), torch.tensor([48])), 1, 1, 16)
    out = plan.attend(*place.put(q * 100, k, v))
    torch.testing.assert_close(out.cpu(), torch.full((1, 1, 1, 16), 20.0))


def test_a_row_does_not_depend_on_its_batch(place):
    """Bit for bit: neighbours, their lengths and their number change nothing."""
    from sparqle_kernels.decode_attention import triton

    q, k, v, slots, lengths = slots_of((3, 3, 3, 1, 2, 40, 16), torch.float32)
    tensors = place.put(q, k, v)
    together = triton.Plan(*place.put(slots, lengths), 2, 3, 16).attend(*tensors)
    for row in range(3):
        plan = triton.Plan(*place.put(slots[row : row + 1], lengths[row : row + 1]), 2, 3, 16)
        alone = plan.attend(tensors[0][row : row + 1], *tensors[1:])
        assert torch.equal(alone[0], together[row])


def test_the_interpreter_refuses_bfloat16(place):
    if place.device != "cpu":
        pytest.skip("a GPU has bfloat16")
    from sparqle_kernels.chunk_attention import triton

    with pytest.raises(NotImplementedError, match="rounding"):
        chunk.flat(triton.chunk_attention)(*chunk.inputs((1, 1, 1, 1, 16), 1.0, torch.bfloat16))


def test_nothing_to_do_is_no_error(place):
    from sparqle_kernels.chunk_attention import triton

    args = place.put(*chunk.inputs((2, 1, 3, 4, 8), 1.0))
    assert chunk.flat(triton.chunk_attention)(*(x[:0] for x in args)).shape == (0, 1, 3, 8)
