"""Scoring: reference and caption texts -> word errors, with the interval that chance allows.

Both sides go through whisper-normalizer's English rules; jiwer aligns them. Rates are those of the
whole corpus: errors of all utterances over words of all references, not a mean of rates. Intervals
are percentile bootstraps (Bisani and Ney, 2004), seeded: over utterances, and over speakers, whose
utterances resemble each other, so that of many speakers this one is the wider and the honester.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import numpy as np

from sparqle_stream import messages
from sparqle_stream.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    Drawn = npt.NDArray[np.int64]  # indices of groups
    Pairs = Sequence[tuple["Tally", "Tally"]]  # of a group: on some terms, and on others

T = TypeVar("T")

N_RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 20250101


class Counts:
    """Of a dataclass that has only numbers: two of them add up, field by field."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        names = (f.name for f in fields(cast("Any", self)))
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True, slots=True)
class Tally(Counts):
    """Counts of one or more utterances."""

    utterances: int = 0
    words: int = 0  # of the reference
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    last_words: int = 0  # utterances with a last word
    last_words_right: int = 0  # whose last word was captioned

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Per cent; 0 without words."""
        return percent(self.errors, self.words)

    @property
    def last_word_recall(self) -> float:
        return percent(self.last_words_right, self.last_words)


def total(tallies: Iterable[Tally]) -> Tally:
    return sum(tallies, Tally())


def percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


class Scorer:
    """Compares texts; loading the normaliser's tables takes a moment, so keep it."""

    def __init__(self) -> None:
        try:
            import jiwer
            from whisper_normalizer.english import EnglishTextNormalizer
        except ImportError as err:
            raise MissingExtraError(
                f"{err.name} is not installed", hint="pip install -e .[dev]"
            ) from err
        self._process = jiwer.process_words
        self._normal = EnglishTextNormalizer()

    def normal(self, text: str) -> str:
        return str(self._normal(text)).strip()

    def score(self, reference: str, hypothesis: str) -> Tally:
        """One utterance. What is written where the reference is empty counts as inserted."""
        reference, hypothesis = self.normal(reference), self.normal(hypothesis)
        if not reference:
            return Tally(utterances=1, insertions=len(hypothesis.split()))
        out = self._process([reference], [hypothesis])
        n_words = len(out.references[0])
        is_last_right = any(
            piece.type == "equal" and piece.ref_end_idx == n_words for piece in out.alignments[0]
        )
        return Tally(
            utterances=1,
            words=n_words,
            substitutions=out.substitutions,
            deletions=out.deletions,
            insertions=out.insertions,
            last_words=1,
            last_words_right=int(is_last_right),
        )


def interval(groups: Sequence[Tally], n: int = N_RESAMPLES, seed: int = SEED) -> list[float] | None:
    """95 % bootstrap interval of the corpus WER in per cent, drawing groups with replacement.

    None for fewer than two groups: there is nothing to draw from.
    """
    if len(groups) < 2:
        return None
    errors = np.array([group.errors for group in groups])
    words = np.array([group.words for group in groups])

    def of(drawn: Drawn) -> float:
        return percent(float(errors[drawn].sum()), float(words[drawn].sum()))

    return _edges(_resampled(len(groups), of, n, seed), 2)


def _resampled(n_groups: int, of: Callable[[Drawn], T], n: int, seed: int) -> list[T]:
    """A figure of so many groups, drawn with replacement n times."""
    rng = np.random.default_rng(seed)
    return [of(rng.integers(0, n_groups, n_groups)) for _ in range(n)]


def _edges(figures: Sequence[float], n_digits: int) -> list[float]:
    """What CONFIDENCE of the figures lie between."""
    tail = 100 * (1 - CONFIDENCE) / 2
    return [round(float(e), n_digits) for e in np.percentile(figures, [tail, 100 - tail])]


def difference(groups: Pairs, n: int = N_RESAMPLES, seed: int = SEED) -> dict[str, Any]:
    """WER of the first of each pair less that of the second, in points, as JSON.

    The 95 % bootstrap interval draws both of a group together; None for fewer than two groups.
    """
    errors, words = _paired(groups)

    def of(drawn: Drawn) -> float:
        (ours, others), (n_ours, n_others) = errors[drawn].sum(0), words[drawn].sum(0)
        return percent(ours, n_ours) - percent(others, n_others)

    edges = _edges(_resampled(len(groups), of, n, seed), 2) if len(groups) > 1 else None
    return {"points": round(of(np.arange(len(groups))), 2), "interval_95": edges}


def _paired(groups: Pairs) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Errors and words (G, 2) of both of each group."""
    errors = np.array([[one.errors, other.errors] for one, other in groups], float)
    return errors, np.array([[one.words, other.words] for one, other in groups], float)


def ratio(groups: Pairs, n: int = N_RESAMPLES, seed: int = SEED) -> dict[str, Any]:
    """(tally, tally of the same on other terms) of each group -> WER over the other's, as JSON.

    The 95 % bootstrap interval draws both of a group together; None for fewer than two groups, and
    where nothing was wrong to divide by.
    """
    errors, words = _paired(groups)

    def of(drawn: Drawn) -> float | None:
        (ours, others), (n_ours, n_others) = errors[drawn].sum(0), words[drawn].sum(0)
        return float(ours / n_ours / (others / n_others)) if n_ours and others else None

    found = [one for one in _resampled(len(groups), of, n, seed) if one is not None]
    whole = of(np.arange(len(groups)))
    return {
        "ratio": None if whole is None else round(whole, 3),
        "ratio_interval_95": _edges(found, 3) if len(found) == n and len(groups) > 1 else None,
    }


def by_speaker(tallies: Iterable[tuple[str, Tally]]) -> dict[str, Tally]:
    """(speaker, tally) of utterances -> their sums, in the order of the names."""
    sums: dict[str, Tally] = {}
    for speaker, tally in tallies:
        sums[speaker] = sums.get(speaker, Tally()) + tally
    return dict(sorted(sums.items()))


def summary(tally: Tally) -> dict[str, Any]:
    """A tally as JSON."""
    return {
        "wer_percent": round(tally.wer, 2),
        "words": tally.words,
        "substitutions": tally.substitutions,
        "deletions": tally.deletions,
        "insertions": tally.insertions,
        "utterances": tally.utterances,
        "last_word_recall_percent": round(tally.last_word_recall, 2),
    }


def text_of(events: Sequence[messages.Event]) -> str:
    """What a client that appends every final has in the end; nothing else is scored."""
    return "".join(event.text for event in events if isinstance(event, messages.Final)).strip()


def n_revisions(events: Sequence[messages.Event]) -> int:
    """Finals that do not simply append to what left before them. Must be 0.

    No message takes words back, so a revision would be a final that goes back: to an earlier
    segment, to an earlier stream time, or to before a word that has left; or whose words do not
    spell the text that a client appends.
    """
    n, segment, time, start = 0, -1, 0.0, 0.0
    for event in events:
        if not isinstance(event, messages.Final):
            continue
        starts = [word.start for word in event.words]
        is_sound = (
            "".join(event.text.split()) == "".join("".join(w.word for w in event.words).split())
            and event.segment >= segment
            and event.time >= time
            and sorted(starts) == starts
            and (not starts or starts[0] >= start)
        )
        n += not is_sound
        segment, time = max(segment, event.segment), max(time, event.time)
        start = max([start, *starts])
    return n
