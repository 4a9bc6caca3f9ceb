"""Settings that writer and reader of a folder of graphs share."""

from __future__ import annotations

FORMAT = 11  # changes with the graphs
INDEX = "stages.json"
DTYPES = ("int8", "float32")  # of the matrices
DEFAULT_DTYPE = "int8"
PASS_ROWS = 64  # of one slot in one pass of the LLM
UNSEEN = -1e30  # added to the score of what must not be seen


def places(n_slot: int) -> int:
    """Length of a slot's arrays: the kernel wants room for a whole pass behind what is written."""
    return n_slot + PASS_ROWS
