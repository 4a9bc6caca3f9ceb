"""Text of transcripts: what the CTC head spells and what the LLM writes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sparqle_stream.pieces import CtcPieces

if TYPE_CHECKING:
    from pathlib import Path

_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "`": "'"})
_SPOKEN = {"mr": "mister", "mrs": "missus", "dr": "doctor", "st": "saint"}  # as LibriSpeech has it


def spoken(text: str) -> str:
    """What CTC is trained on: lower case, letters and apostrophes, single spaces.

    >>> spoken("Mr. O'Neil -- said: 'No!'")
    "mister o'neil said no"
    """
    text = text.translate(_APOSTROPHES).lower()
    text = re.sub(r"[^a-z' ]+", " ", text)
    words = (word.strip("'") for word in text.split())
    return " ".join(_SPOKEN.get(word, word) for word in words if word)


def is_spelled_out(text: str) -> bool:
    """Digits and abbreviations with dots are read in ways that the text does not say."""
    return bool(text) and not re.search(r"\d|\b[A-Z]\.[A-Z]|[^\x00-\x7f‘’“”—–]", text)


def train_pieces(texts: list[str], size: int, out: Path) -> CtcPieces:
    """Trains the lower-case BPE vocabulary of the CTC head (Sennrich et al., 2016)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<blank>"],
        initial_alphabet=list("▁abcdefghijklmnopqrstuvwxyz'"),
        limit_alphabet=28,
        show_progress=False,
    )
    tokenizer.train_from_iterator((spoken(t) for t in texts), trainer)
    tokenizer.save(str(out))
    return CtcPieces(tokenizer)


def is_plain(text: str) -> bool:
    """Whether case and punctuation are the corpus' habit and say nothing: all capitals, or none.

    >>> is_plain("WE CALL IT BEAR"), is_plain("we call it bear"), is_plain("we call it bear.")
    (True, True, False)
    """
    return text.isupper() or (text.islower() and not re.search(r"[.,?!;:]", text))


def written(text: str) -> str:
    """What the LLM is taught to write: case and punctuation as the corpus has them.

    A transcript without either becomes one plain sentence.

    >>> written("WE CALL IT BEAR")
    'We call it bear.'
    """
    text = " ".join(text.translate(_APOSTROPHES).split())
    if not is_plain(text):
        return text
    text = re.sub(r"\bi\b", "I", text.lower())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")
