"""decode_attention: every implementation against a dense loop in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sparqle_kernels.decode_attention import cpu, decode_attention, make_plan, reference

# float32 rounding of at most a few hundred additions; bf16 keeps 8 bits of the result
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
PLANS = {"chosen": make_plan, "cpu": cpu.Plan.of, "reference": reference.Plan.of}
# (slots, rows of the batch, heads, kv heads, new rows, slot length, head width)
SHAPES = [
    (1, 1, 1, 1, 1, 1, 8),
    (1, 1, 9, 3, 1, 640, 64),
    (2, 2, 4, 4, 3, 17, 16),
    (5, 3, 9, 3, 4, 33, 64),
    (7, 4, 9, 3, 1, 33, 64),
    (4, 4, 6, 1, 8, 8, 24),
]


def attend(name, q, k, v, slots, lengths):
    plan = PLANS[name](slots, lengths, q.shape[2], q.shape[1] // k.shape[1])
    return decode_attention(q, k, v, plan)


def dense(q, k, v, slots, lengths):
    """One query row at a time, every sum in float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    n_groups, n_rows = q.shape[1] // k.shape[1], q.shape[2]
    for b, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        for h in range(q.shape[1]):
            for r in range(n_rows):
                n_seen = length - n_rows + r + 1
                keys = k[slot, h // n_groups, :n_seen].double()
                values = v[slot, h // n_groups, :n_seen].double()
                weights = (keys @ q[b, h, r].double() / math.sqrt(q.shape[-1])).softmax(0)
                out[b, h, r] = weights @ values
    return out


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "S{}-B{}-H{}-G{}-R{}-N{}-d{}".format(*s))
def test_equals_a_dense_loop(name, dtype, shape):
    n_slots, batch, n_heads, n_kv, n_rows, n_slot, width = shape
    gen = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(batch, n_heads, n_rows, width, generator=gen).to(dtype)
    k, v = torch.randn(2, n_slots, n_kv, n_slot, width, generator=gen).to(dtype)
    slots = torch.randperm(n_slots, generator=gen)[:batch].sort().values
    lengths = torch.randint(n_rows, n_slot + 1, (batch,), generator=gen)
    lengths[0] = n_slot
    expected = dense(q, k, v, slots, lengths)
    got = attend(name, q, k, v, slots, lengths)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", PLANS)
def test_what_lies_past_the_length_is_not_there(name):
    """Slots are reused without clearing: large finite leftovers must not move a bit."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 2, 16, generator=gen)
    k, v = torch.randn(2, 2, 3, 20, 16, generator=gen)
    slots, lengths = torch.tensor([1]), torch.tensor([11])
    clean = attend(name, q, k, v, slots, lengths)
    k[1, :, 11:], v[1, :, 11:] = 1e4, -1e4
    k[0], v[0] = torch.nan, torch.nan
    torch.testing.assert_close(attend(name, q, k, v, slots, lengths), clean, atol=0.0, rtol=0.0)


def test_cpu_reads_no_byte_past_the_length():
    """Poisoned memory: what was never written may hold NaN."""
    gen = torch.Generator().manual_seed(1)
    q = torch.randn(2, 6, 3, 16, generator=gen)
    k, v = torch.randn(2, 2, 3, 20, 16, generator=gen)
    k[:, :, 12:], v[:, :, 12:] = torch.nan, torch.nan
    out = attend("cpu", q, k, v, torch.tensor([0, 1]), torch.tensor([12, 5]))
    assert out.isfinite().all()
