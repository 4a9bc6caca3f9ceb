"""Memory of many streams that costs nothing before it is written."""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Kind = type[np.float32 | np.float16 | np.int8]


def sparse_zeros(shape: Sequence[int], kind: Kind) -> npt.NDArray[Any]:
    """Zeros (shape) of a kind that take memory page by page as they are written.

    Huge pages, which some systems give unasked, would take 2 MB for the first byte of a stream's
    part in each of the many arrays: 40 MB a stream instead of 10.
    """
    size = math.prod(shape)
    if not size:
        return np.zeros(tuple(shape), kind)
    pages = mmap.mmap(-1, size * np.dtype(kind).itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, kind).reshape(tuple(shape))
