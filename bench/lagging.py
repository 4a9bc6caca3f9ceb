"""Lagging: average lagging (AL), length-adaptive (LAAL) and differentiable (DAL) of simultaneous
translation, so that captions can be compared with what papers report.

In: per word the seconds of source that had been heard (algorithmic), or the seconds that had passed
(with compute), when it was emitted; |X|, the seconds of the source; |Y|, words. A perfect writer
emits word i at (i - 1) |X| / |Y|: lagging is how far behind that one is, on average, until the
source has ended (AL, LAAL) or over all words, none earlier than its predecessor plus a word (DAL).
Formulas as in SimulEval. A recording with long pauses has no even rate of words: there these
figures say less than emission delays do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_stream import messages

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sparqle_stream.messages import Event

    Lagging = dict[str, float | int | None]


def average(delays: Sequence[float], source_s: float, n_target: int) -> float:
    """AL of one recording; delays in the order of the words, n_target words of reference."""
    if delays[0] > source_s:
        return delays[0]
    step = source_s / n_target
    total, n = 0.0, 0
    for delay in delays:
        total += delay - n * step
        n += 1
        if delay >= source_s:
            break
    return total / n


def length_adaptive(delays: Sequence[float], source_s: float, n_reference: int) -> float:
    """LAAL: words that nobody said do not make it look better."""
    return average(delays, source_s, max(n_reference, len(delays)))


def differentiable(delays: Sequence[float], source_s: float) -> float:
    """DAL: a word that leaves together with others is not earlier than they are."""
    step = source_s / len(delays)
    total = latest = 0.0
    for i, delay in enumerate(delays):
        latest = max(delay, latest + step) if i else delay
        total += latest - i * step
    return total / len(delays)


def of_words(arrivals: Iterable[tuple[float, Event]]) -> list[float]:
    """(seconds, event) of one stream -> seconds at which each of its words was there."""
    return [at for at, event in arrivals if isinstance(event, messages.Final) for _ in event.words]


def summary(recordings: Sequence[tuple[Sequence[float], float, int]]) -> Lagging:
    """(delays of words, |X|, words of reference) of recordings -> means over recordings in ms.

    Recordings without a caption are left out; 0 words of reference stand for an unknown text, and
    the words that were written are counted instead.
    """
    told = [(d, x, n or len(d)) for d, x, n in recordings if len(d)]
    scores = {
        "al_ms": [average(*one) for one in told],
        "laal_ms": [length_adaptive(*one) for one in told],
        "dal_ms": [differentiable(d, x) for d, x, _ in told],
    }
    means: Lagging = {
        name: round(1000 * sum(values) / len(values), 1) if values else None
        for name, values in scores.items()
    }
    return {"recordings": len(told)} | means
