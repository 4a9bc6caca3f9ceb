"""The ops at the shapes of serving: what is compiled, counted, and measured.

In: a device and a type, for example 'meta' to compile and 'cuda' to measure. A case counts what has
to move and to be computed from its shapes alone: `n_bytes` is every input read once and every
output written once; `unfused_bytes` is what the same mathematics moves when each PyTorch op reads
its inputs from memory and writes its result there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparqle_kernels.chunk_attention import Ring
from sparqle_kernels.log_mel import make_transform
from sparqle_kernels.rms_norm_rope_append import Rotation, Slots

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparqle_kernels.launch import Launch

HEADS, WIDTH = 8, 64  # encoder and Q-Former
LLM_HEADS, KV_HEADS, LLM_WIDTH = 9, 3, 576
CHUNK, LEFT = 16, 256  # frames
SLOT = 512
STREAMS = (1, 16, 256, 2048)
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Problem:
    """One op with its arguments."""

    args: tuple[Any, ...]
    n_bytes: int
    n_flops: int
    unfused_bytes: int


@dataclass(frozen=True, slots=True)
class Case:
    """`build(streams, dtype, device)`; `has_products`: fp16 and bf16 must use tensor cores.

    `streams` are the numbers of them, or of utterances, that are counted and measured.
    """

    op: str
    label: str
    build: Callable[[int, torch.dtype, str], Problem]
    has_products: bool = True
    streams: tuple[int, ...] = STREAMS
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def launches(self, problem: Problem) -> tuple[list[Launch], Any]:
        """What Triton would run, and the tensors that it fills."""
        if self.op == "decode_attention":
            from sparqle_kernels.decode_attention import triton as decode

            q, k, v, slots, lengths, n_groups = problem.args
            return decode.Plan(slots, lengths, q.shape[2], n_groups).launches(q, k, v)
        if self.op == "utterance_attention":
            from sparqle_kernels.utterance_attention import triton as utterance

            q, k, v, d_out, *mask = problem.args
            forward, (out, lse) = utterance.forward_launches(q, k, v, *mask)
            backward, grads = utterance.backward_launches((q, k, v, out, lse), d_out, *mask)
            return forward + backward, (out, *grads)
        module = __import__(f"sparqle_kernels.{self.op}.triton", fromlist=["launches"])
        found: tuple[list[Launch], Any] = module.launches(*problem.args)
        return found


def n_bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def chunk_attention(n_frames: int) -> Callable[[int, torch.dtype, str], Problem]:
    """A chunk against a full ring."""

    def build(streams: int, dtype: torch.dtype, device: str) -> Problem:
        q, k, v = _random(3, streams, HEADS, n_frames, WIDTH, dtype=dtype, device=device)
        ring_k, ring_v = _random(2, streams, HEADS, LEFT, WIDTH, dtype=dtype, device=device)
        position = torch.arange(LEFT, device=device).expand(streams, LEFT).contiguous()
        rows = torch.arange(streams, device=device)
        moved = n_bytes(q, k, v, ring_k, ring_v, position, rows, q)
        n_scores = streams * HEADS * n_frames * (LEFT + n_frames)
        # the rows' rings are copied; cat reads and writes all keys and values, attention reads them
        # again; scores are written and read in the type of q, by mask, softmax and second product
        unfused = moved + 2 * n_bytes(k, v) + 4 * n_bytes(ring_k, ring_v)
        unfused += 6 * n_scores * q.element_size()
        args = (q, k, v, Ring(ring_k, ring_v, position, rows))
        return Problem(args, moved, 4 * n_scores * WIDTH, unfused)

    return build


def query_attention(n_keys: int, n_ages: int) -> Callable[[int, torch.dtype, str], Problem]:
    """Four queries, as in a chunk of 320 ms, against a ring and the chunk's own entries."""

    def build(streams: int, dtype: torch.dtype, device: str) -> Problem:
        q = _random(streams, HEADS, 4, WIDTH, dtype=dtype, device=device)
        k, v = _random(2, streams, HEADS, n_keys, WIDTH, dtype=dtype, device=device)
        age = torch.arange(4 * n_keys, device=device).view(4, n_keys) % n_ages
        age = age.expand(streams, -1, -1).contiguous()
        seen = torch.ones(streams, 4, n_keys, dtype=torch.bool, device=device)
        bias = _random(HEADS, n_ages, dtype=dtype, device=device)
        moved = n_bytes(q, k, v, age, seen, bias, q)
        n_scores = streams * HEADS * 4 * n_keys
        # keys and values are cleaned (read, written), the bias is gathered, masked, added
        unfused = moved + 2 * n_bytes(k, v) + 12 * n_scores * q.element_size()
        return Problem((q, k, v, age, seen, bias), moved, 4 * n_scores * WIDTH, unfused)

    return build


def frame_attention(streams: int, dtype: torch.dtype, device: str) -> Problem:
    """The first case of query_attention with its projections moved to the queries."""
    n_queries, n_frames, width = 4, 80, HEADS * WIDTH
    q = _random(streams, HEADS, n_queries, width, dtype=dtype, device=device)
    frames = _random(streams, n_frames, width, dtype=dtype, device=device)
    age = torch.arange(n_queries * n_frames, device=device).view(n_queries, n_frames) % 129
    age = age.expand(streams, -1, -1).contiguous()
    seen = torch.ones(streams, n_queries, n_frames, dtype=torch.bool, device=device)
    bias = _random(HEADS, 129, dtype=dtype, device=device)
    moved = n_bytes(q, frames, age, seen, bias, q)
    n_scores = streams * HEADS * n_queries * n_frames
    # frames are projected to keys and values, which attention reads; its own as query_attention
    unfused = n_bytes(age, seen, bias) + 10 * n_bytes(frames) + 12 * n_scores * q.element_size()
    args = (q, frames, age, seen, bias, WIDTH**-0.5)
    return Problem(args, moved, 4 * n_scores * width, unfused)


def decode_attention(n_rows: int, n_slot: int) -> Callable[[int, torch.dtype, str], Problem]:
    """Every slot three quarters full; what lies past the length costs nothing."""

    def build(streams: int, dtype: torch.dtype, device: str) -> Problem:
        q = _random(streams, LLM_HEADS, n_rows, WIDTH, dtype=dtype, device=device)
        k, v = _random(2, streams, KV_HEADS, n_slot, WIDTH, dtype=dtype, device=device)
        slots = torch.arange(streams, device=device)
        lengths = torch.full((streams,), n_slot * 3 // 4, device=device)
        moved = n_bytes(q, q, slots, lengths) + n_bytes(k, v) * 3 // 4
        n_scores = streams * LLM_HEADS * n_rows * n_slot * 3 // 4
        # whole slots are gathered and repeated for the heads that share them
        unfused = n_bytes(q, q) + (3 + 2 * LLM_HEADS // KV_HEADS) * n_bytes(k, v)
        unfused += 6 * streams * LLM_HEADS * n_rows * n_slot * q.element_size()
        args = (q, k, v, slots, lengths, LLM_HEADS // KV_HEADS)
        return Problem(args, moved, 4 * n_scores * WIDTH, unfused)

    return build


def utterance_attention(streams: int, dtype: torch.dtype, device: str) -> Problem:
    """Utterances of 20 s with the masks of streaming, forward and backward."""
    n_frames = 1000
    shape = (streams, n_frames, HEADS, WIDTH)
    q, k, v, d_out = _random(4, *shape, dtype=dtype, device=device).transpose(2, 3)
    n_scores = streams * HEADS * n_frames * (LEFT + CHUNK)
    # forward reads q, k, v and writes out; backward reads these and d_out and writes three
    moved = 4 * n_bytes(q) + 8 * n_bytes(q)
    # the scores of all pairs of frames, masked: written and read as in chunk_attention, and
    # once more backward with their gradient
    unfused = moved + 14 * streams * HEADS * n_frames**2 * q.element_size()
    args = (q, k, v, d_out, CHUNK, LEFT)
    return Problem(args, moved, 14 * n_scores * WIDTH, unfused)


def add_layer_norm(streams: int, dtype: torch.dtype, device: str) -> Problem:
    x, y = _random(2, streams * CHUNK, HEADS * WIDTH, dtype=dtype, device=device)
    weight, bias = _random(2, HEADS * WIDTH, dtype=dtype, device=device)
    moved = 4 * n_bytes(x) + n_bytes(weight, bias)
    return Problem((x, y, weight, bias, 1e-5), moved, 8 * x.numel(), moved + n_bytes(x))


def stop_head(streams: int, dtype: torch.dtype, device: str) -> Problem:
    x = _random(streams, LLM_WIDTH, dtype=dtype, device=device)
    norm, weight = _random(2, LLM_WIDTH, dtype=dtype, device=device)
    bias = _random(1, dtype=dtype, device=device)
    moved = 2 * n_bytes(x) + n_bytes(norm, weight, bias) + 4 * streams
    # the head reads the hidden again; the product is written, and read to add the bias
    unfused = moved + n_bytes(x) + 2 * streams * x.element_size()
    return Problem((x, norm, 1e-5, weight, bias), moved, 6 * x.numel(), unfused)


def rms_norm_rope_append(n_rows: int) -> Callable[[int, torch.dtype, str], Problem]:
    def build(streams: int, dtype: torch.dtype, device: str) -> Problem:
        n_heads = LLM_HEADS + 2 * KV_HEADS
        x = _random(streams, n_rows, LLM_WIDTH, dtype=dtype, device=device)
        qkv = _random(streams, n_rows, n_heads * WIDTH, dtype=dtype, device=device)
        rotation = Rotation(*_random(2, SLOT, WIDTH, dtype=torch.float32, device=device))
        k, v = _random(2, streams, KV_HEADS, SLOT, WIDTH, dtype=dtype, device=device)
        start = torch.full((streams,), SLOT // 2, device=device)
        slots = Slots(k, v, torch.arange(streams, device=device), start)
        row_of_table = 2 * 4 * WIDTH
        moved = n_bytes(x, qkv, qkv) + streams * (16 + n_rows * row_of_table)
        # the norm writes x and the projections read it; rotating q and k takes a copy of their
        # halves, two products and a sum; the new rows are copied into the slots
        rotated = (LLM_HEADS + KV_HEADS) * n_bytes(qkv) // n_heads
        unfused = moved + 2 * n_bytes(x) + 9 * rotated + 2 * KV_HEADS * n_bytes(qkv) // n_heads
        flops = 3 * x.numel() + 4 * qkv.numel()
        return Problem((x, qkv, 1e-5, rotation, slots), moved, flops, unfused)

    return build


def log_mel(streams: int, _dtype: torch.dtype, device: str) -> Problem:
    """The 32 frames of a chunk, always in float32."""
    n_frames, n_fft, hop, n_mels = 2 * CHUNK, 400, 160, 80
    wave = _random(streams, n_fft - hop // 4 + hop * n_frames, dtype=torch.float32, device=device)
    window = torch.hann_window(n_fft, device=device)
    bank = _random(n_fft // 2 + 1, n_mels, dtype=torch.float32, device=device).abs()
    transform = make_transform(window, bank)
    n_bins = n_fft // 2 + 1
    moved = n_bytes(wave, *transform[1:]) + 4 * streams * n_frames * n_mels
    # frames are cut out and windowed, the complex spectrum written, squared (two parts, a sum),
    # multiplied with the bank, clamped and logged
    per_frame = 4 * (2 * n_fft + 2 * n_bins + 6 * n_bins + n_bins + 4 * n_mels)
    unfused = moved + streams * n_frames * per_frame
    flops = streams * n_frames * (4 * n_bins * n_bins + 2 * n_bins * n_mels)
    return Problem((wave, transform, hop), moved, flops, unfused)


def _random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)


CASES = [
    Case("chunk_attention", f"T {CHUNK}, ring {LEFT}", chunk_attention(CHUNK)),
    Case("chunk_attention", f"T 64, ring {LEFT}", chunk_attention(64)),
    Case("query_attention", "4 queries, 80 frames", query_attention(80, 129)),
    Case("query_attention", "4 queries, 68 queries", query_attention(68, 129)),
    Case("frame_attention", "4 queries, 80 frames", frame_attention, dtypes=HALVES),
    Case("decode_attention", f"1 row, slot {SLOT}", decode_attention(1, SLOT)),
    Case("decode_attention", f"4 rows, slot {SLOT}", decode_attention(4, SLOT)),
    Case("decode_attention", f"8 rows, slot {SLOT}", decode_attention(8, SLOT)),
    Case("decode_attention", f"32 rows, slot {SLOT}", decode_attention(32, SLOT)),
    Case("decode_attention", "4 rows, slot 256", decode_attention(4, 256)),
    Case(
        "utterance_attention",
        f"T 1000, chunk {CHUNK}, left {LEFT}",
        utterance_attention,
        streams=(1, 8, 32),
    ),
    Case("add_layer_norm", f"{CHUNK} rows of {HEADS * WIDTH}", add_layer_norm, False),
    Case("rms_norm_rope_append", "1 row", rms_norm_rope_append(1), False),
    Case("rms_norm_rope_append", "4 rows", rms_norm_rope_append(4), False),
    Case("stop_head", f"width {LLM_WIDTH}", stop_head, False),
    Case("log_mel", f"{2 * CHUNK} frames", log_mel, False, dtypes=(torch.float32,)),
]
