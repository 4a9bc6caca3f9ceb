"""Judge: the LLM as a language model of speech, in torch.

In: rival readings of a row as tokens of plain text. Out: log p of each after the plain text that
the row has said. The LLM's weights are those that write captions; what tells it that plain text
follows are K and V of some places before it, trained for that (prefix tuning, Li and Liang, 2021;
`training.prefix`). Contract: what a row is told depends on its own text alone; places apart, in
which readings are read, are nobody's. `onnx_cpu.judge` reads them as a tree instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparqle_stream import llm as llm_stage
from sparqle_stream.errors import ModelError
from sparqle_stream.plain_text import LONGEST, MOST_KEPT, MOST_RIVALS, PlainText, shortened

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sparqle_stream.config import LlmConfig
    from sparqle_stream.llm import Llm, LlmState

    Doubts = dict[int, list[list[int]]]  # rival readings by row, as tokens

MOST_PLACES = 64  # apart: a slot of memory each
# Bias of tokens that plain text never used; their share is in no sum.
UNUSED = -8.0


@dataclass(frozen=True, slots=True)
class TextPrefix:
    """What stands before plain text, and the tokens that it uses."""

    k: Tensor  # (L, KV, P, d) rotated
    v: Tensor  # (L, KV, P, d)
    ids: Tensor  # (U,) int64
    bias: Tensor  # (V,)

    @classmethod
    def of(cls, stored: Mapping[str, Tensor], cfg: LlmConfig) -> TextPrefix | None:
        """From the tensors `text.*` of a bridge, without that name; None where there are none.

        Raises ModelError for those of another LLM.
        """
        if not stored:
            return None
        shape = (cfg.n_layers, cfg.n_kv_heads, cfg.head_width)
        if lacking := {"k", "v", "ids", "bias"} - stored.keys():
            raise ModelError(f"the bridge has no text.{min(lacking)}", hint="export it anew")
        k, v, ids = stored["k"].float(), stored["v"].float(), stored["ids"].long()
        found = {(*x.shape[:2], *x.shape[3:]) for x in (k, v)}
        if found != {shape} or int(ids.max()) >= cfg.vocab:
            raise ModelError("the prefix for plain text is of another LLM", hint="train it anew")
        if k.shape[2] + 2 * LONGEST > cfg.n_slot:
            raise ModelError(
                f"a prefix of {k.shape[2]} places leaves no room in slots of {cfg.n_slot}",
                hint="train a shorter one, or make n_slot larger",
            )
        bias = torch.full((cfg.vocab,), UNUSED)
        bias[ids] = stored["bias"].float()
        return cls(k, v, ids, bias)

    @property
    def n_places(self) -> int:
        return self.k.shape[2]


class Judge:
    """Plain text of all rows; its slots lie behind those of the captions in the LLM's state."""

    def __init__(
        self, llm: Llm, state: LlmState, prefix: TextPrefix, n_rows: int, bos_id: int
    ) -> None:
        """state: of `n_slots(prefix, n_rows)` slots."""
        self.llm, self.state, self.n_rows = llm, state, n_rows
        device, dtype, n = state.k.device, state.k.dtype, prefix.n_places
        self.plain = PlainText(n_rows, min(state.k.shape[3], n + MOST_KEPT), bos_id)
        head = llm.tokens if llm.head is None else llm.head
        self._head: Tensor = head.get_parameter("weight").detach()
        self._bias, self._ids = prefix.bias.to(device), prefix.ids.to(device)
        self._used = self._head[self._ids]  # (U, E)
        self._n_places = n
        self._length = [n] * n_rows  # of each row's plain text, as in state.length
        state.k[:, n_rows:, :, :n] = prefix.k.to(device, dtype)[:, None]
        state.v[:, n_rows:, :, :n] = prefix.v.to(device, dtype)[:, None]

    def wipe(self, row: int) -> None:
        self.plain.wipe(row)

    def say(self, row: int, ids: list[int]) -> None:
        """The row's plain text goes on with ids."""
        self.plain.say(row, ids)

    @torch.inference_mode()
    def judge(self, doubts: Mapping[int, list[list[int]]]) -> dict[int, list[float]]:
        """log p of each row's readings after its plain text."""
        out: dict[int, list[float]] = {}
        for some in _portions(doubts, self.state.k.shape[1] - 2 * self.n_rows):
            out |= self._judge(some)
        return out

    def _judge(self, doubts: Doubts) -> dict[int, list[float]]:
        """One pass: what waits goes into a row's slot, and before each reading into its place."""
        slots, starts, rows = list[int](), list[int](), list[list[int]]()
        place, waiting = 2 * self.n_rows, dict[int, list[int]]()
        for row, readings in doubts.items():
            waiting[row] = ids = self._catch_up(row)
            self._lend(row, place, len(readings))
            slots += [self.n_rows + row, *range(place, place + len(readings))]
            starts += [self._length[row]] * (1 + len(readings))
            rows += [ids, *(ids + reading[:-1] for reading in readings)]
            place += len(readings)
        hidden, before, at = self._read(slots, starts, rows), list[Tensor](), 0
        for row, readings in doubts.items():
            text, n = self.n_rows + row, len(waiting[row])
            if n:
                self.state.hidden[text] = hidden[at, n - 1]
                self._length[row] += n
            first = self.state.hidden[text][None]
            for i, ids in enumerate(readings):
                before.append(torch.cat([first, hidden[at + 1 + i, n : n + len(ids) - 1]]))
            at += 1 + len(readings)
        sums = iter(self._log_probs(before, [ids for of in doubts.values() for ids in of]))
        return {row: [next(sums) for _ in readings] for row, readings in doubts.items()}

    def _catch_up(self, row: int) -> list[int]:
        """What the row's plain text has to read."""
        ids, is_new = self.plain.take(row, self._length[row])
        if is_new:
            self._length[row] = self._n_places
        return ids

    def _lend(self, row: int, place: int, n: int) -> None:
        """n places hold what the plain text's slot does, behind the prefix, which all have."""
        counts = slice(self._n_places, self._length[row])
        text = self.n_rows + row
        for array in (self.state.k, self.state.v):
            array[:, place : place + n, :, counts] = array[:, text : text + 1, :, counts]

    def _read(self, slots: list[int], starts: list[int], rows: list[list[int]]) -> Tensor:
        """rows, padded on the right, behind what counts in their slots -> hidden (N, R, E)."""
        longest, device = max(map(len, rows)), self._ids.device
        if not longest:
            return self.state.hidden.new_zeros(len(rows), 0, self.state.hidden.shape[1])
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        order = torch.tensor(slots, device=device).argsort()  # slots of a pass ascend
        where = torch.tensor(slots, device=device)[order]
        self.state.length[where] = torch.tensor(starts, device=device)[order]
        embeds = self.llm.embed(ids[order])
        x = llm_stage.through_layers(self.llm, self.state, embeds, where)
        hidden: Tensor = self.llm.norm(x)
        return hidden[order.argsort()]

    def _log_probs(self, before: list[Tensor], readings: list[list[int]]) -> list[float]:
        """Hidden states (R, E) before each of a reading's R tokens -> log p of all of them."""
        hidden = torch.cat(before)
        ids = torch.tensor([i for reading in readings for i in reading], device=self._ids.device)
        logits = (hidden * self._head[ids]).float().sum(dim=-1) + self._bias[ids]
        every = torch.nn.functional.linear(hidden, self._used).float() + self._bias[self._ids]
        log_probs = (logits - every.logsumexp(dim=-1)).cpu()  # the one wait for the device
        ends = accumulate(map(len, readings))
        return [
            float(log_probs[end - len(ids) : end].sum())
            for ids, end in zip(readings, ends, strict=True)
        ]


def _portions(doubts: Mapping[int, list[list[int]]], n_places: int) -> Iterator[Doubts]:
    """As many rows as there are places for their readings."""
    some: Doubts = {}
    for row, readings in doubts.items():
        found = shortened(readings)
        if some and sum(map(len, some.values())) + len(found) > n_places:
            yield some
            some = {}
        some[row] = found
    if some:
        yield some


def n_slots(prefix: TextPrefix | None, n_rows: int) -> int:
    """Slots of an LLM's state: each row's captions, its plain text, and places apart."""
    if prefix is None:
        return n_rows
    return 2 * n_rows + min(max(MOST_RIVALS, 4 * n_rows), MOST_PLACES)
