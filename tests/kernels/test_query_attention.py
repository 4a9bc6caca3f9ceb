"""query_attention against its definition in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from sparqle_kernels.query_attention import query_attention
from sparqle_kernels.query_attention.reference import query_attention as reference

# (B, H, Q, L, d): the shipped shapes of cross- and self-attention, single entries, nothing round.
SHAPES = [
    (2, 8, 4, 80, 64),
    (2, 8, 4, 68, 64),
    (1, 1, 1, 1, 1),
    (3, 2, 5, 7, 3),
    (1, 3, 16, 129, 17),
]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}
# What the package chooses here, and the reference where that is not the same function.
IMPLEMENTATIONS = {query_attention: "chosen", reference: "reference"}
by_implementation = pytest.mark.parametrize("op", IMPLEMENTATIONS, ids=IMPLEMENTATIONS.values())


def inputs(shape, dtype=torch.float32, share=0.6, seed=0):
    """q, k, v, age, seen, bias. Every query sees something; what none sees is NaN."""
    b, h, n_queries, length, d = shape
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(b, h, n_queries, d, generator=gen).to(dtype)
    k, v = torch.randn(2, b, h, length, d, generator=gen).to(dtype)
    n_ages = 2 * length + 1
    age = torch.randint(0, n_ages, (b, n_queries, length), generator=gen)
    seen = torch.rand(b, n_queries, length, generator=gen) < share
    seen[:, :, 0] |= ~seen.any(dim=2)
    bias = torch.randn(h, n_ages, generator=gen).to(dtype)
    for x in (k, v):
        x.masked_fill_(~seen.any(dim=1)[:, None, :, None], torch.nan)
    return q, k, v, age, seen, bias


def truth(q, k, v, age, seen, bias):
    """Query by query in float64, over the entries it sees and no others."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(len(q)):
        for i in range(q.shape[2]):
            at = seen[b if len(seen) > 1 else 0, i].nonzero()[:, 0]
            ages = age[b if len(age) > 1 else 0, i, at]
            keys, values = k[b][:, at].double(), v[b][:, at].double()
            scores = (keys @ q[b, :, i, :, None].double())[..., 0] / q.shape[-1] ** 0.5
            weights = (scores + bias[:, ages].double()).softmax(dim=-1)
            out[b, :, i] = (weights[:, :, None] * values).sum(dim=1)
    return out


@pytest.mark.usefixtures("poisoned")
@by_implementation
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_definition(op, shape, share, dtype):
    args = inputs(shape, dtype, share)
    out = op(*args)
    assert (out.shape, out.dtype) == (args[0].shape, dtype)
    assert (out.double() - truth(*args)).abs().max().item() < TOLERANCES[dtype]


@by_implementation
def test_one_mask_may_serve_the_whole_batch(op):
    """As training uses it: age and seen of batch 1 against rows of equal shape."""
    q, k, v, age, seen, bias = inputs((3, 2, 5, 9, 4), share=1.0)
    args = (q, k, v, age[:1], seen[:1], bias)
    assert (op(*args).double() - truth(*args)).abs().max() < 1e-5


@by_implementation
def test_an_even_bias_changes_nothing(op):
    """Softmax does not know a constant: what the whole-utterance Q-Former relies on."""
    q, k, v, age, seen, bias = inputs((2, 2, 3, 6, 4), torch.float64)
    flat = op(q, k, v, age, seen, torch.full_like(bias, 5.0))
    torch.testing.assert_close(flat, op(q, k, v, age, seen, bias * 0.0), atol=1e-12, rtol=0)


@by_implementation
def test_gradients(op):
    """Of queries, keys, values and the bias table, whose entries are shared by many scores."""
    q, k, v, age, seen, bias = inputs((2, 2, 3, 5, 4), torch.float64)
    k, v = k.nan_to_num(1.0), v.nan_to_num(1.0)
    trained = [x.requires_grad_() for x in (q, k, v, bias)]

    def forward(q, k, v, bias):
        return op(q, k, v, age, seen, bias)

    assert torch.autograd.gradcheck(forward, trained)


@by_implementation
def test_gradients_of_what_nobody_sees_are_zero(op):
    """NaN in unseen entries reaches no gradient."""
    q, k, v, age, seen, bias = inputs((1, 2, 3, 8, 4), share=0.2)
    unseen = ~seen.any(dim=1)[0]
    assert unseen.any()
    trained = [x.requires_grad_() for x in (q, k, v, bias)]
    grads = torch.autograd.grad(op(q, k, v, age, seen, bias).square().sum(), trained)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][:, :, unseen].any()
    assert not grads[2][:, :, unseen].any()
