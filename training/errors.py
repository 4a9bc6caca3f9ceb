"""Errors of the training commands: one line and a hint on stderr, exit 2; bugs keep their trace.

Ctrl-C is 130 and no trace.
"""

from __future__ import annotations

import errno
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from sparqle_stream.errors import SparqleError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def reported() -> Iterator[None]:
    """What a user can cause inside the block is told as the command line of the product does."""
    try:
        yield
    except SparqleError as err:
        print(f"error: {err.message}\nhint: {err.hint}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as err:
        is_full = err.errno == errno.ENOSPC  # writing to an open file names none
        if err.filename is None and not is_full:
            raise
        where = f"{err.filename}: " if err.filename else ""
        print(f"error: {where}{err.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except SafetensorError as err:  # a full disk, too, is one of its own
        print(f"error: weights: {err}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
