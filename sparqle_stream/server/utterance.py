"""What was said since the last boundary: final words, and the provisional tail after them.

For dialects that repeat a moving text until it is settled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparqle_stream.messages import Final, Word


@dataclass(slots=True)
class Utterance:
    """Starts empty; `add` finals, set `tail`, and make a new one at the boundary."""

    start: float  # stream seconds; the first word moves it
    text: str = ""
    words: list[Word] = field(default_factory=list)
    tail: str = ""

    def add(self, event: Final) -> None:
        if not self.words and event.words:
            self.start = max(self.start, event.words[0].start)
        self.words.extend(event.words)
        self.text += event.text
        self.tail = ""

    @property
    def settled(self) -> str:
        """What will not change."""
        return self.text.strip()

    @property
    def moving(self) -> str:
        """All of it, the tail included."""
        return f"{self.text.strip()} {self.tail.strip()}".strip()

    @property
    def end(self) -> float:
        """Where its last final word ends; words of one chunk may overlap a little."""
        return max([self.start, *(word.end for word in self.words)])

    @property
    def seconds(self) -> float:
        return self.end - self.start
