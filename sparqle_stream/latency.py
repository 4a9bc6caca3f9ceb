"""Latency of one stream: how long words and the ends of utterances were waited for.

Emission delay is stream time: from the end of a word to the end of the audio that the engine had
heard when the word left. End of speech to final is wall-clock time, of a source at the speed of
speech: from the end of the last word before a pause to the arrival of that word.
"""

from __future__ import annotations

import statistics
from array import array
from typing import TYPE_CHECKING

from sparqle_stream import messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparqle_stream.messages import Event


class Latency:
    """Takes events with the wall-clock second, since the first sample, at which each arrived."""

    def __init__(self) -> None:
        self.emission_s, self.end_to_final_s = array("d"), array("d")  # 80 kB an hour
        self.duration = 0.0
        self.compute_seconds = 0.0
        self._last_final: tuple[float, float] | None = None  # end of its last word, arrival

    def add(self, event: Event, arrived_s: float) -> None:
        match event:
            case messages.Final(words=words) if words:
                self.emission_s.extend(word.emitted - word.end for word in words)
                self._last_final = words[-1].end, arrived_s
            case messages.SpeechStopped() if self._last_final:
                end, arrived = self._last_final
                self.end_to_final_s.append(arrived - end)
                self._last_final = None
            case messages.Done():
                self.duration = event.duration
                self.compute_seconds = event.compute_seconds

    def line(self) -> str:
        """The figures in one line, for people."""
        rtf = self.compute_seconds / self.duration if self.duration else 0.0
        parts = [
            f"emission delay {_p50_p90(self.emission_s)} ({len(self.emission_s)} words)",
            f"end of speech to final {_p50_p90(self.end_to_final_s)}",
            f"RTF {rtf:.2f} ({self.compute_seconds:.1f} s for {self.duration:.1f} s)",
        ]
        return " | ".join(parts)


def _p50_p90(values: Sequence[float]) -> str:
    if not values:
        return "- (no words)"
    if len(values) == 1:
        return f"{values[0] * 1000:.0f} ms"
    p90 = statistics.quantiles(values, n=10, method="inclusive")[-1]
    return f"p50 {statistics.median(values) * 1000:.0f} ms, p90 {p90 * 1000:.0f} ms"
