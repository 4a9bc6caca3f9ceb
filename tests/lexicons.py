"""Small lexicons over the pieces of `testing.tiny_model`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_stream import testing
from sparqle_stream.lexicon import Lexicon
from training.words import Corpus, count, estimate

if TYPE_CHECKING:
    from collections.abc import Sequence


def lexicon_of(texts: Sequence[Sequence[str]]) -> Lexicon:
    """Words and n-grams of some texts."""
    corpus = Corpus()
    corpus.add(texts)
    return Lexicon.of(estimate(*count(corpus, 1000, 1)), testing.tiny_pieces())
