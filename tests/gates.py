"""Gates: a call that another thread makes waits until the test lets it go on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from sparqle_stream.testing import OracleBatch

if TYPE_CHECKING:
    import pytest

LONG_S = 30.0  # for a worker on a busy machine; a passing test waits for none of it


class Gate:
    """Keeps calls of a method, a worker's step unless said, from beginning until it is opened."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, owner: type = OracleBatch, name: str = "run"
    ) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        call = getattr(owner, name)

        def gated(*args: Any) -> Any:
            self.entered.set()
            assert self.opened.wait(LONG_S)
            return call(*args)

        monkeypatch.setattr(owner, name, gated)
