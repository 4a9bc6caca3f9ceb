"""A batch with a bug, for the tests of the benchmarks."""

from __future__ import annotations

from sparqle_stream import testing


class BrokenBatch(testing.OracleBatch):
    """Fails when it hears a q."""

    def run(self, sessions):
        result = super().run(sessions)
        q = 1 + len(testing.LETTERS) + testing.LETTERS.index("q")
        if any(q in slot.codes for slot in self.slots):
            raise RuntimeError("a bug")
        return result
