"""Row by row ops: add_layer_norm, stop_head, rms_norm_rope_append, and their kernels in Triton."""

from __future__ import annotations

import math

import pytest
import torch

from sparqle_kernels.add_layer_norm import add_layer_norm
from sparqle_kernels.add_layer_norm import reference as norm_reference
from sparqle_kernels.rms_norm_rope_append import Rotation, Slots, rms_norm_rope_append
from sparqle_kernels.rms_norm_rope_append import reference as append_reference
from sparqle_kernels.stop_head import reference as stop_reference
from sparqle_kernels.stop_head import stop_head
from sparqle_stream.writer import Greedy
from tests.kernels.exactness import assert_as_exact_as_pytorch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EPS = 1e-5
WIDTHS = [(1, 1), (3, 17), (63, 65), (5, 576)]  # (rows, width): single, odd, past a tile, shipped
# (slots, rows of the batch, heads, kv heads, new rows, slot length, head width, E)
APPENDS = [(1, 1, 1, 1, 1, 1, 2, 1), (5, 3, 9, 3, 4, 20, 64, 576), (3, 2, 4, 1, 7, 9, 6, 17)]


def random(*shape, dtype=torch.float64, seed=0, scale=1.0, mean=0.0):
    gen = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=gen) * scale + mean).to(dtype)


def norm_inputs(shape, dtype):
    """A mean far from 0, which a careless variance would not survive."""
    x, y = (random(*shape, dtype=dtype, seed=s, mean=8.0) for s in (1, 2))
    return x, y, random(shape[1], dtype=dtype, seed=3), random(shape[1], dtype=dtype, seed=4)


def norm_truth(x, y, weight, bias):
    total = (x + y).double()  # rounded to the type of x: that is what is stored
    centred = total - total.mean(dim=-1, keepdim=True)
    spread = (centred.square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    return total, centred / spread * weight.double() + bias.double()


@by_dtype
@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_add_layer_norm(place, shape, dtype):
    place.wants(dtype)
    from sparqle_kernels.add_layer_norm import triton

    args = norm_inputs(shape, dtype)
    total, normed = triton.add_layer_norm(*place.put(*args), EPS)
    pytorch = norm_reference.add_layer_norm(*args, EPS)
    exact = norm_truth(*args)
    assert torch.equal(total.cpu(), pytorch[0])
    assert_as_exact_as_pytorch(normed, pytorch[1], exact[1])


def test_add_layer_norm_by_its_definition():
    args = norm_inputs((3, 17), torch.float64)
    for got, expected in zip(add_layer_norm(*args, EPS), norm_truth(*args), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def stop_inputs(shape, dtype):
    x = random(*shape, dtype=dtype, seed=1, scale=3.0)
    norm, weight = (random(shape[1], dtype=dtype, seed=s) for s in (2, 3))
    return x, norm, weight, random(1, dtype=dtype, seed=4)


def stop_truth(x, norm, weight, bias):
    """Hidden and logit in float64."""
    x, norm, weight, bias = (y.double() for y in (x, norm, weight, bias))
    hidden = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * norm
    return hidden, hidden @ weight + bias


@by_dtype
@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_stop_head(place, shape, dtype):
    """The logit is that of the hidden as it was rounded, which is what the head sees."""
    place.wants(dtype)
    from sparqle_kernels.stop_head import triton

    x, norm, weight, bias = stop_inputs(shape, dtype)
    hidden, logit = triton.stop_head(*place.put(x, norm), EPS, *place.put(weight, bias))
    pytorch, their_logit = stop_reference.stop_head(x, norm, EPS, weight, bias)
    assert_as_exact_as_pytorch(hidden, pytorch, stop_truth(x, norm, weight, bias)[0])
    exact = hidden.cpu().double() @ weight.double() + bias.double()
    assert logit.dtype == their_logit.dtype == torch.float32
    torch.testing.assert_close(logit.cpu().double(), exact, atol=1e-4, rtol=1e-5)


def test_stop_head_by_its_definition():
    args = stop_inputs((3, 17), torch.float64)
    got = stop_head(args[0], args[1], EPS, *args[2:])
    for ours, exact in zip(got, stop_truth(*args), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=0)


def test_a_broken_row_stops(place):
    """NaN must not write text for ever: its logit is NaN, and below no writer's odds."""
    from sparqle_kernels.stop_head import triton

    x, one, bias = torch.tensor([[math.nan, 1.0], [0.0, 0.0]]), torch.ones(2), torch.tensor([0.5])
    on_place = place.put(x, one, one, bias)
    for _, logit in (
        triton.stop_head(*on_place[:2], EPS, *on_place[2:]),
        stop_head(x, one, EPS, one, bias),
    ):
        assert [Greedy(3).goes_on(stop) for stop in logit.tolist()] == [False, False]
        assert [Greedy(3, 0.7).goes_on(stop) for stop in logit.tolist()] == [False, True]


def append_inputs(shape, dtype):
    """x, qkv, rotation, slots with NaN where nobody wrote; the last row of several is inactive."""
    n_slots, batch, n_heads, n_kv, n_rows, n_slot, d, width = shape
    x = random(batch, n_rows, width, dtype=dtype, seed=1, scale=4.0)
    qkv = random(batch, n_rows, (n_heads + 2 * n_kv) * d, dtype=dtype, seed=2, scale=4.0)
    angle = torch.outer(torch.arange(n_slot), 0.3 ** torch.arange(d // 2).double())
    cos, sin = angle.cos().float(), angle.sin().float()
    rotation = Rotation(torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1))
    k, v = torch.full((2, n_slots, n_kv, n_slot, d), torch.nan, dtype=dtype)
    gen = torch.Generator().manual_seed(0)
    index = torch.randperm(n_slots, generator=gen)[:batch]
    start = torch.randint(0, n_slot - n_rows + 1, (batch,), generator=gen)
    start[0] = n_slot - n_rows
    if batch > 1:
        index[-1] = -1
        x[-1], qkv[-1], start[-1] = torch.nan, torch.nan, n_slot + 1
    return x, qkv, rotation, Slots(k, v, index, start)


def append_truth(x, qkv, rotation, slots):
    """q, and what each active row writes to its entry of k and v, one number at a time."""
    _, n_kv, _, d = slots.k.shape
    heads = qkv.double().unflatten(-1, (-1, d))  # (B, R, H + 2 KV, d)
    scale = (x.double().square().mean(dim=-1) + EPS).rsqrt()
    q = torch.zeros_like(heads[:, :, : -2 * n_kv]).transpose(1, 2)
    k, v = slots.k.double(), slots.v.double()
    for b, (slot, start) in enumerate(zip(slots.slot.tolist(), slots.start.tolist(), strict=True)):
        for r in range(x.shape[1] if slot >= 0 else 0):
            own = heads[b, r] * scale[b, r]
            low, high = own[:, : d // 2], own[:, d // 2 :]
            cos = rotation.cos[start + r, : d // 2].double()
            sin = rotation.sin[start + r, d // 2 :].double()
            turned = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=1)
            q[b, :, r] = turned[: -2 * n_kv]
            k[slot, :, start + r] = turned[-2 * n_kv : -n_kv]
            v[slot, :, start + r] = own[-n_kv:]
    return q, k, v


@pytest.mark.parametrize("shape", APPENDS, ids=str)
def test_rms_norm_rope_append_by_its_definition(shape):
    x, qkv, rotation, slots = append_inputs(shape, torch.float64)
    exact = append_truth(x, qkv, rotation, slots)
    q = rms_norm_rope_append(x, qkv, EPS, rotation, slots)
    for got, expected in zip((q, slots.k, slots.v), exact, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12, equal_nan=True)


def test_folding_the_norm_into_the_matrix_changes_nothing():
    """norm(x) @ W.T = (x @ (W diag(norm)).T) / rms(x): what the op's second argument relies on."""
    x, norm, matrix = random(2, 3, 8), random(8, seed=1), random(6, 8, seed=2)
    folded = x @ (matrix * norm).T / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    plain = torch.nn.functional.rms_norm(x, (8,), norm, EPS) @ matrix.T
    torch.testing.assert_close(folded, plain, atol=1e-12, rtol=0)


@by_dtype
@pytest.mark.parametrize("shape", APPENDS, ids=str)
def test_rms_norm_rope_append(place, shape, dtype):
    place.wants(dtype)
    from sparqle_kernels.rms_norm_rope_append import triton

    x, qkv, rotation, slots = append_inputs(shape, dtype)
    exact = append_truth(x, qkv, rotation, slots)
    theirs = slots._replace(k=slots.k.clone(), v=slots.v.clone())
    pytorch = append_reference.rms_norm_rope_append(x, qkv, EPS, rotation, theirs)
    ours = Slots(*place.put(*slots))
    on_place = Rotation(*place.put(*rotation))
    q = triton.rms_norm_rope_append(*place.put(x, qkv), EPS, on_place, ours)
    assert_as_exact_as_pytorch(q, pytorch, exact[0])
    for got, plain, expected in zip((ours.k, ours.v), (theirs.k, theirs.v), exact[1:], strict=True):
        written = ~expected.isnan()
        assert torch.equal(got.cpu().isnan(), ~written), "an entry too many or too few"
        assert_as_exact_as_pytorch(got.cpu()[written], plain[written], expected[written])


@pytest.mark.parametrize("active", [(), (2,), (0, 1, 2)], ids=str)
def test_who_is_not_active_writes_nothing(active):
    """In the reference too, which may not look who that is: even where slot 0 is somebody's."""
    x, qkv, rotation, slots = append_inputs((3, 3, 2, 1, 2, 9, 8, 16), torch.float64)
    x, qkv = x.nan_to_num(1.0), qkv.nan_to_num(1.0)
    slot = torch.tensor([i if i in active else -1 for i in range(3)])
    slots = slots._replace(slot=slot, start=torch.tensor([0, 3, 20 if 2 not in active else 7]))
    exact = append_truth(x, qkv, rotation, slots)
    q = append_reference.rms_norm_rope_append(x, qkv, EPS, rotation, slots)
    for got, expected in zip((q, slots.k, slots.v), exact, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12, equal_nan=True)


def test_what_does_not_fit_hits_no_neighbour(place):
    """A row past the end of its slot is dropped: the slot behind it in memory stays as it was."""
    from sparqle_kernels.rms_norm_rope_append import triton

    x, qkv, rotation, slots = append_inputs((3, 1, 2, 1, 3, 5, 8, 16), torch.float32)
    slots = slots._replace(slot=torch.tensor([0]), start=torch.tensor([4]))
    ours = Slots(*place.put(*slots))
    triton.rms_norm_rope_append(*place.put(x, qkv), EPS, Rotation(*place.put(*rotation)), ours)
    written = ~ours.k.cpu().isnan().any(dim=-1)[:, 0]  # (S, N)
    assert written.nonzero().tolist() == [[0, 4]]
