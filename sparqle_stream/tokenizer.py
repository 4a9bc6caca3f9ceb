"""Tokenizer: text <-> ids of the LLM's vocabulary, around the `tokenizers` library. Stateless."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer


class TextTokenizer:
    """Byte-level BPE: text -> ids and back, without special tokens of its own accord."""

    def __init__(self, tokenizer: Tokenizer, bos_id: int) -> None:
        self.bos_id = bos_id
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path, bos_id: int) -> TextTokenizer:
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(path)), bos_id)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def save(self, path: Path) -> None:
        self._tokenizer.save(str(path))

    def decode(self, ids: list[int]) -> str:
        """Bytes that are not UTF-8 (yet) come out as U+FFFD."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
