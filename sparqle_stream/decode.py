"""Decode: the loop that writes a chunk's words, between an LLM and those who decide.

For every row a `Writer` says whether another token is wanted and which it takes of those that a
`Decoder`, an LLM over its slots, has scored. Contract: every token that is picked is appended to
its row's slot, once; a row's tokens depend on its own slot and writer alone. No torch in here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Expect = Callable[[int], list[list[int]]]  # row -> what `Writer.expect` says


class Writer(Protocol):
    """One row's decisions in one chunk."""

    n_most: int  # tokens that may be written

    def goes_on(self, stop: float) -> bool:
        """Whether another token is wanted; `stop` is the stop head's logit."""
        ...

    def suggest(self) -> list[int]:
        """Tokens to be scored; none: the LLM's best one."""
        ...

    def pick(self, ids: Sequence[int], scores: Sequence[float]) -> list[int]:
        """The tokens to write, of ids (K,) with their logits: what the LLM thinks of each.

        More than one: those that the first leads to. None: the chunk's text ends.
        """
        ...

    def expect(self) -> list[list[int]]:
        """What it would pick now, and after that, if nothing unlikely happens: a guess that saves
        passes where it is right, and changes nothing where it is not.
        """
        ...

    def doubts(self) -> list[list[int]]:
        """Rival readings of what is said next, as tokens of plain text, for the LLM to judge.

        Asked once a chunk, before anything is written; none: it knows by itself.
        """
        ...

    def judged(self, log_probs: Sequence[float]) -> None:
        """Takes log p of each of its doubts, after the plain text that it wrote so far."""
        ...

    def plain(self) -> list[int]:
        """What was picked last as tokens of plain text; none where nobody judges."""
        ...

    def is_over(self) -> bool:
        """Whether nothing more can follow in this chunk, whatever the LLM thinks.

        What was picked last need not be read then before the next chunk comes.
        """
        ...


class Decoder(Protocol):
    """An LLM over its slots, after the queries of a chunk were read."""

    def stops(self, rows: Sequence[int]) -> Sequence[float]:
        """The stop head's logits."""
        ...

    def score(self, wanted: Mapping[int, list[int]]) -> dict[int, tuple[list[int], list[float]]]:
        """Each row's ids and their logits; for a row that wants none, its best id and logit."""
        ...

    def read(self, tokens: Mapping[int, list[int]], expect: Expect) -> None:
        """Appends tokens to their rows' slots, after all that was left there.

        What a row expects may be read ahead in the same pass, and counts once it is picked.
        """
        ...

    def leave(self, tokens: Mapping[int, list[int]]) -> None:
        """Appends them before the next that is appended, at the latest."""
        ...

    def judge(
        self, doubts: Mapping[int, list[list[int]]], going: Sequence[int], expect: Expect
    ) -> dict[int, list[float]]:
        """log p of each row's readings after its plain text; what was left in the rows that go on,
        and what they expect, may be read in the same pass.
        """
        ...

    def note(self, plain: Mapping[int, list[int]]) -> None:
        """Plain text goes on: later readings are judged after it."""
        ...


def write(decoder: Decoder, writers: Mapping[int, Writer]) -> dict[int, list[int]]:
    """One chunk: what the rows' writers choose. Every token is appended to its row's slot.

    Queries that were left are not read for a row in which nothing can be written now. Doubts are
    judged once, before the first token. The stop head is asked before every token, and before any
    logit is computed.
    """
    tokens: dict[int, list[int]] = {row: [] for row in writers}
    going = [row for row in writers if not writers[row].is_over()]

    def expect(row: int) -> list[list[int]]:
        return writers[row].expect()

    doubts = {row: found for row in going if (found := writers[row].doubts())}
    for row, log_probs in decoder.judge(doubts, going, expect).items():
        writers[row].judged(log_probs)
    decoder.read({row: [] for row in going}, expect)
    while going:
        stops = decoder.stops(going)
        going = [r for r, stop in zip(going, stops, strict=True) if writers[r].goes_on(stop)]
        offers = decoder.score({row: writers[row].suggest() for row in going})
        picks = {row: writers[row].pick(*offers[row]) for row in going}
        picks = {row: pick for row, pick in picks.items() if pick}
        for row, pick in picks.items():
            tokens[row] += pick
        decoder.note({row: plain for row in picks if (plain := writers[row].plain())})
        over = {row: pick for row, pick in picks.items() if writers[row].is_over()}
        decoder.leave(over)
        going = [row for row in picks if row not in over]
        decoder.read({row: picks[row] for row in going}, expect)
    return tokens
