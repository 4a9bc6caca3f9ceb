"""Settings that writer and reader of a folder of graphs share."""

from __future__ import annotations

FORMAT = 5  # changes with the graphs
INDEX = "stages.json"
BITS = {"int4": 4, "int8": 8, "float32": 32}  # of the LLM's matrices, by --dtype
DEFAULT_DTYPE = "int4"
PASS_ROWS = 64  # of one slot in one pass of the LLM


def places(n_slot: int) -> int:
    """Length of a slot's arrays: the kernel wants room for a whole pass behind what is written."""
    return n_slot + PASS_ROWS
