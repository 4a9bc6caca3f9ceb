"""Bounds: what the machine cannot do faster -> printed beside what was measured.

Whoever decodes one row reads every weight once per pass, so bytes over bandwidth is time that no
program can save. It leaves out arithmetic, K/V caches and activations: a lower bound, not a goal.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

    from sparqle_stream.models import SparqleModel

PROBE_BYTES = 1 << 28  # several times the last-level cache of most machines
PROBE_TIMES = 5


def of_chunk(model: SparqleModel, chunk_ms: int, read_gb_s: float | None = None) -> dict[str, Any]:
    """The least time for one chunk of one stream: every weight but the vocabulary read once.

    `vocabulary_mb` is read once more for every token that is written, `llm_mb` for every token
    after the first.
    """
    bandwidth = read_gigabytes_per_s() if read_gb_s is None else read_gb_s
    sizes = weight_megabytes(model)
    chunk = sum(mb for part, mb in sizes.items() if part != "vocabulary")
    least_ms = chunk / bandwidth  # 10^6 bytes over 10^9 bytes a second
    return {
        "read_gb_per_s": round(bandwidth, 1),
        **{f"{part}_mb": round(mb, 1) for part, mb in sizes.items()},
        "chunk_ms_at_least": round(least_ms, 2),
        "rtf_at_least": round(least_ms / chunk_ms, 4),
    }


def read_gigabytes_per_s(n_bytes: int = PROBE_BYTES, n_times: int = PROBE_TIMES) -> float:
    """10^9 bytes a second that all threads of torch read together, the best of some times."""
    block = torch.ones(n_bytes // 4)
    best = min(_seconds_to_sum(block) for _ in range(n_times))
    return n_bytes / best / 1e9


def weight_megabytes(model: SparqleModel) -> dict[str, float]:
    """10^6 bytes that one row reads, per stage."""
    head = model.llm.tokens if model.llm.head is None else model.llm.head
    body = _bytes_of(model.llm, without=(model.llm.tokens, model.llm.head))
    return {
        "encoder": _bytes_of(model.encoder) / 1e6,
        "ctc": _bytes_of(model.ctc) / 1e6,
        "qformer": _bytes_of(model.qformer) / 1e6,
        "llm": body / 1e6,
        "vocabulary": _bytes_of(head) / 1e6,
    }


def _bytes_of(module: nn.Module, without: tuple[nn.Module | None, ...] = ()) -> int:
    """Second forms of int8 matrices, which many rows use, do not count."""
    skipped = {id(t) for part in without if part is not None for t in _tensors(part).values()}
    return sum(
        tensor.nbytes
        for name, tensor in _tensors(module).items()
        if id(tensor) not in skipped and not name.endswith("many")
    )


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _seconds_to_sum(block: torch.Tensor) -> float:
    start = time.perf_counter()
    block.sum()
    return time.perf_counter() - start
