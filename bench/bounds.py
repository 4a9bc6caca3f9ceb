"""Bounds: what the machine cannot do faster -> printed beside what was measured.

Whoever decodes one row reads every weight once per pass, so bytes over bandwidth is time that no
program can save. It leaves out arithmetic, K/V caches and activations: a lower bound, not a goal.
The bandwidth is that of the threads which read: a stream that stays on one has one thread's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sparqle_stream.models import Model

PROBE_BYTES = 1 << 28  # several times the last-level cache of most machines
PROBE_TIMES = 5


def of_chunk(
    model: Model, chunk_ms: int, read_gb_s: float | None = None, compute: str = "cpu"
) -> dict[str, Any] | None:
    """The least time for a chunk of one stream whose queries are read, as `llm` does in one pass:
    every weight but the vocabulary once. None on CUDA, whose memory is not what is measured here.

    `vocabulary_mb` is read once more for every token that is written, `llm_mb` for every token
    after the first. It is no bound where streams share a pass, nor over chunks in which the LLM
    reads nothing: those cost `chunk_ms_at_least` less `llm_mb`.
    """
    if compute != "cpu":
        return None
    bandwidth = bandwidth_of_stream(model) if read_gb_s is None else read_gb_s
    sizes = weight_megabytes(model)
    chunk = sum(mb for part, mb in sizes.items() if part != "vocabulary")
    least_ms = chunk / bandwidth  # 10^6 bytes over 10^9 bytes a second
    return {
        "read_gb_per_s": round(bandwidth, 1),
        **{f"{part}_mb": round(mb, 1) for part, mb in sizes.items()},
        "chunk_ms_at_least": round(least_ms, 2),
        "rtf_at_least": float(f"{least_ms / chunk_ms:.3g}"),  # of a tiny model it is no zero
    }


def bandwidth_of_stream(model: Model) -> float:
    """10^9 bytes a second that the threads of one stream of `model` can read.

    A model that several workers share has one thread in each (onnx), any other has torch's.
    """
    return read_gigabytes_per_s(1 if model.is_shared else torch.get_num_threads())


def read_gigabytes_per_s(
    n_threads: int, n_bytes: int | None = None, n_times: int = PROBE_TIMES
) -> float:
    """10^9 bytes a second that so many threads read together, the best of some times."""
    block, before = torch.ones((n_bytes or PROBE_BYTES) // 4), torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        best = min(_seconds_to_sum(block) for _ in range(n_times))
    finally:
        torch.set_num_threads(before)
    return 4 * block.numel() / best / 1e9


def weight_megabytes(model: Model) -> dict[str, float]:
    """10^6 bytes that one row reads, per stage."""
    return {part: n_bytes / 1e6 for part, n_bytes in model.weight_bytes().items()}


def _seconds_to_sum(block: torch.Tensor) -> float:
    start = time.perf_counter()
    block.sum()
    return time.perf_counter() - start
