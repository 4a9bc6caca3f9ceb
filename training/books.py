"""Books as text to learn from: sentences one by one, or passages as readers cut them.

What cannot be spoken as it is written (digits, capitals, foreign letters) is left out, sentence by
sentence, and what stands in texts that something will be measured on by `Shared`.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

from sparqle_stream.errors import ConfigError
from training import manifests
from training.text import spoken

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

INLINE_TAGS = frozenset(
    ["a", "abbr", "b", "big", "cite", "em", "i", "small", "span", "strong", "u"]
)
BREAK = "\f"  # where a heading, a paragraph or a cell ends, a sentence does
N_SHARED = 6  # words in a row that two texts share only if one is of the other
LONGEST_PASSAGE = 100  # words
# Words of a passage: gamma-distributed, as LibriSpeech's utterances nearly are.
SHAPE, SCALE = 2.2, 11.0


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in INLINE_TAGS:
            self.parts.append(" " if tag == "br" else BREAK)

    def handle_endtag(self, tag: str) -> None:
        self.handle_starttag(tag, [])


def _pieces(html_or_text: str, ends: str) -> Iterator[str]:
    """All of a text, cut behind `ends`; "" for what cannot be spoken as it is written."""
    parser = _Text()
    parser.feed(html_or_text)
    text = re.sub(r"[^\S\f]+", " ", "".join(parser.parts))
    text = re.sub(r" ?(?:—|--) ?", ", ", text.replace("’", "'"))
    for raw in re.split(rf"(?<=[{ends}])\s+|\f", text):
        piece = raw.strip(" \"“”‘'")
        plain = bool(re.fullmatch(r"[A-Za-z][A-Za-z ,.'!?;:-]+", piece))
        yield piece if plain and not piece.isupper() else ""


def sentences_of(html_or_text: str, low: int = 4, high: int = 28) -> list[str]:
    """Sentences of `low`..`high` words that hold letters, commas and full stops only."""
    pieces = _pieces(html_or_text, ".!?;:")
    return [piece for piece in pieces if low <= len(piece.split()) <= high]


def passages_of(html_or_text: str, rng: random.Random) -> list[str]:
    """Passages as `spoken`, of a few to 100 words, which end at any mark: readers stop inside of a
    sentence, and after three of them. None goes over a sentence that cannot be spoken."""
    out, said, wanted = list[str](), list[str](), 0
    sentences = (*_pieces(html_or_text, ".!?"), "")
    for piece in (piece for one in sentences for piece in re.split(r"(?<=[,;:])\s+", one)):
        words = spoken(piece).split()
        if said and (not words or len(said) + len(words) > LONGEST_PASSAGE):
            out.append(" ".join(said))
            said = []
        if not said:
            wanted = max(3, int(rng.gammavariate(SHAPE, SCALE)))
        said += words
        if len(said) >= wanted:
            out.append(" ".join(said))
            said = []
    return out


class Shared:
    """What texts that something is measured on say: all of them, and any six words in a row."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._known: set[tuple[str, ...]] = set()
        for text in texts:
            words = tuple(spoken(text).split())
            self._known |= {words, *_in_a_row(words)}

    @classmethod
    def of(cls, files: Iterable[Path]) -> Shared:
        """Of whatever `training.manifests` reads, and of files with a sentence a line.

        Raises OSError, ConfigError for what is neither.
        """
        return cls(text for path in files for text in _texts(path))

    def __contains__(self, text: str) -> bool:
        words = tuple(spoken(text).split())
        return words in self._known or not self._known.isdisjoint(_in_a_row(words))


def _in_a_row(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + N_SHARED]) for i in range(len(words) - N_SHARED + 1))


def _texts(path: Path) -> list[str]:
    if path.is_dir() or ".jsonl" in path.name:
        return [recording.text for recording in manifests.read(path)[1]]
    try:
        return path.read_text().splitlines()
    except ValueError as err:
        raise ConfigError(
            f"{path} has no texts to leave out: {err}", hint="a manifest, or a sentence a line"
        ) from err
