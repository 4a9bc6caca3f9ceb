"""The same mathematics in PyTorch: what the kernels are compared with, and what is the truth.

In: the arguments of a case of `sparqle_kernels.cases`. Out: the op's tensors, always as a list.
'eager' writes every step out, 'sdpa' calls PyTorch's fused attention, 'compiled' is 'eager' through
torch.compile. In float64 'eager' is the truth that all of them answer to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparqle_kernels.add_layer_norm.reference import add_layer_norm
from sparqle_kernels.chunk_attention.reference import Ring, chunk_attention
from sparqle_kernels.decode_attention import reference as decode
from sparqle_kernels.frame_attention.reference import frame_attention
from sparqle_kernels.log_mel.reference import log_mel
from sparqle_kernels.query_attention.reference import query_attention
from sparqle_kernels.rms_norm_rope_append.reference import Rotation, Slots, rms_norm_rope_append
from sparqle_kernels.stop_head.reference import stop_head
from sparqle_kernels.utterance_attention.reference import utterance_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    Op = Callable[..., list[Tensor]]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + bias
    out: Tensor = scores.softmax(dim=-1) @ v
    return out


def _unseen(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def eager_chunk(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> list[Tensor]:
    ring_k, ring_v, position = (x[ring.rows] for x in ring[:3])
    written = position >= 0
    seen = torch.cat([written, written.new_ones(len(q), k.shape[2])], dim=1)
    keys, values = torch.cat([ring_k, k], dim=2), torch.cat([ring_v, v], dim=2)
    return [_attend(q, keys, values, _unseen(seen[:, None, None], q.dtype))]


def eager_query(
    q: Tensor, k: Tensor, v: Tensor, age: Tensor, seen: Tensor, bias: Tensor
) -> list[Tensor]:
    scores = bias[:, age].transpose(0, 1) + _unseen(seen[:, None], q.dtype)
    return [_attend(q, k, v, scores)]


def eager_frames(
    q: Tensor, frames: Tensor, age: Tensor, seen: Tensor, bias: Tensor, scale: float
) -> list[Tensor]:
    scores = bias[:, age].transpose(0, 1) + _unseen(seen[:, None], q.dtype)
    return [_attend(q * (scale * q.shape[3] ** 0.5), frames[:, None], frames[:, None], scores)]


def eager_decode(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, n_groups: int
) -> list[Tensor]:
    keys, values = (x[slots].repeat_interleave(n_groups, dim=1) for x in (k, v))
    last = lengths[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)
    seen = torch.arange(k.shape[2], device=k.device) <= last[..., None]
    return [_attend(q, keys, values, _unseen(seen[:, None], q.dtype))]


def sdpa_decode(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, n_groups: int
) -> list[Tensor]:
    return [decode.Plan.of(slots, lengths, q.shape[2], n_groups).attend(q, k, v)]


def _masked(q: Tensor, k: Tensor, v: Tensor, chunk: int, left: int) -> Tensor:
    frame = torch.arange(q.shape[2], device=q.device)
    start = (frame // chunk * chunk)[:, None]
    seen = (frame >= start - left) & (frame < start + chunk)
    return _attend(q, k, v, _unseen(seen, q.dtype))


def _with_gradients(attention: Callable[..., Tensor]) -> Op:
    """Output and the gradients of q, k, v."""

    def op(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, *mask: int) -> list[Tensor]:
        qkv = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*qkv, *mask)
        return [out.detach(), *torch.autograd.grad(out, qkv, d_out)]

    return op


def eager_append(
    x: Tensor, qkv: Tensor, eps: float, rotation: Rotation, slots: Slots
) -> list[Tensor]:
    return [rms_norm_rope_append(x, qkv, eps, rotation, slots), slots.k, slots.v]


EAGER: dict[str, Op] = {
    "chunk_attention": eager_chunk,
    "query_attention": eager_query,
    "frame_attention": eager_frames,
    "decode_attention": eager_decode,
    "utterance_attention": _with_gradients(_masked),
    "add_layer_norm": lambda *args: list(add_layer_norm(*args)),
    "rms_norm_rope_append": eager_append,
    "stop_head": lambda *args: list(stop_head(*args)),
    "log_mel": lambda *args: [log_mel(*args)],
}
SDPA: dict[str, Op] = {
    "chunk_attention": lambda *args: [chunk_attention(*args)],
    "query_attention": lambda *args: [query_attention(*args)],
    "frame_attention": lambda *args: [frame_attention(*args)],
    "decode_attention": sdpa_decode,
    "utterance_attention": _with_gradients(utterance_attention),
}


def rivals(op: str, *, is_compiled: bool) -> dict[str, Op]:
    """Name -> the op; torch.compile only where it is wanted, it takes seconds a shape."""
    found = {"eager": EAGER[op]}
    if op in SDPA:
        found["sdpa"] = SDPA[op]
    if is_compiled:
        found["compiled"] = torch.compile(EAGER[op], dynamic=False)
    return found


def in_float64(arguments: Any) -> Any:  # noqa: ANN401 - a tree of tensors and numbers
    """The same arguments with every floating-point tensor copied to float64."""
    if isinstance(arguments, Tensor):
        return arguments.double() if arguments.is_floating_point() else arguments
    if isinstance(arguments, tuple):
        items = [in_float64(item) for item in arguments]
        return type(arguments)(*items) if hasattr(arguments, "_fields") else tuple(items)
    return arguments


def copied(arguments: Any) -> Any:  # noqa: ANN401
    """A copy of the arguments, for ops that write into them."""
    if isinstance(arguments, Tensor):
        return arguments.clone()
    if isinstance(arguments, tuple):
        items = [copied(item) for item in arguments]
        return type(arguments)(*items) if hasattr(arguments, "_fields") else tuple(items)
    return arguments
