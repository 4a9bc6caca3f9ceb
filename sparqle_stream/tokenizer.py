"""Tokenizer: text <-> ids of the LLM's vocabulary, around the `tokenizers` library. Stateless."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_stream.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json. Raises ModelError for a file that is missing or damaged."""
    from tokenizers import Tokenizer

    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as err:  # the library raises nothing more precise
        raise ModelError(f"cannot read {path}: {err}", hint="fetch or export it anew") from err
    return tokenizer


class TextTokenizer:
    """Byte-level BPE: text -> ids and back, without special tokens of its own accord."""

    def __init__(self, tokenizer: Tokenizer, bos_id: int) -> None:
        self.bos_id = bos_id
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path, bos_id: int) -> TextTokenizer:
        """Raises ModelError."""
        return cls(read_tokenizer(path), bos_id)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def save(self, path: Path) -> None:
        self._tokenizer.save(str(path))

    def decode(self, ids: list[int]) -> str:
        """Bytes that are not UTF-8 (yet) come out as U+FFFD."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
