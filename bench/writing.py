"""Writing: how captions are written beside how their reference is, in capitals and punctuation.

Word error rates count neither. Compared are the words that both texts have (jiwer's alignment of
their letters): whether each begins with a capital, and whether it is followed by a pause (comma,
semicolon, colon, dash) or by the end of a sentence. A reference without marks or without two kinds
of letters says nothing of this and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.scoring import Counts, percent

if TYPE_CHECKING:
    from collections.abc import Iterable

ENDS, PAUSES = frozenset(".?!…"), frozenset(",;:—–-")
QUOTES = "\"'“”‘’()[]«»"


@dataclass(frozen=True, slots=True)
class Writing(Counts):
    """Counts over words that both texts have."""

    words: int = 0
    capitals: int = 0  # of the reference
    capitals_written: int = 0
    capitals_right: int = 0
    marks: int = 0  # of the reference
    marks_written: int = 0
    marks_right: int = 0  # of the same kind


def says_how_to_write(text: str) -> bool:
    """Whether a reference has punctuation and capitals among other letters."""
    return bool(ENDS & set(text)) and text.lower() != text and text.upper() != text


def compare(reference: str, hypothesis: str) -> Writing:
    """One utterance; nothing where the reference does not say how it is to be written."""
    from jiwer import process_words

    if not says_how_to_write(reference):
        return Writing()
    wanted, written = _words(reference), _words(hypothesis)
    if not wanted or not written:
        return Writing()
    said, shown = ([word for word, *_ in words] for words in (wanted, written))
    counts = Writing()
    for piece in process_words(" ".join(said), " ".join(shown)).alignments[0]:
        if piece.type == "equal":
            ours = written[piece.hyp_start_idx : piece.hyp_end_idx]
            for one, other in zip(
                wanted[piece.ref_start_idx : piece.ref_end_idx], ours, strict=True
            ):
                counts += _pair(one, other)
    return counts


def _pair(wanted: tuple[str, bool, str], written: tuple[str, bool, str]) -> Writing:
    (_, is_capital, mark), (_, has_capital, has_mark) = wanted, written
    return Writing(
        words=1,
        capitals=is_capital,
        capitals_written=has_capital,
        capitals_right=is_capital and has_capital,
        marks=bool(mark),
        marks_written=bool(has_mark),
        marks_right=bool(mark) and mark == has_mark,
    )


def _words(text: str) -> list[tuple[str, bool, str]]:
    """(letters in lower case, whether it begins with a capital, '' or 'pause' or 'end') of words.

    A dash that stands alone belongs to the word before it.
    """
    found: list[tuple[str, bool, str]] = []
    for token in text.split():
        bare = token.strip(QUOTES)
        letters = "".join(c for c in bare if c.isalnum() or c == "'")
        tail = set(bare[len(bare.rstrip("".join((*ENDS, *PAUSES, *QUOTES)))) :])
        mark = "end" if ENDS & tail else "pause" if PAUSES & tail else ""
        if letters:
            found.append((letters.lower(), bare[:1].isupper(), mark))
        elif found and mark and not found[-1][2]:
            found[-1] = (*found[-1][:2], mark)
    return found


def summary(pairs: Iterable[tuple[str, str]]) -> dict[str, Any] | None:
    """(reference, hypothesis) of utterances -> JSON; None where no reference can tell."""
    counts = sum((compare(*pair) for pair in pairs), Writing())
    if not counts.marks:
        return None
    return {
        "words": counts.words,
        "capitals": counts.capitals,
        "capital_precision_percent": round(percent(counts.capitals_right, counts.capitals_written)),
        "capital_recall_percent": round(percent(counts.capitals_right, counts.capitals)),
        "marks": counts.marks,
        "mark_precision_percent": round(percent(counts.marks_right, counts.marks_written)),
        "mark_recall_percent": round(percent(counts.marks_right, counts.marks)),
    }
