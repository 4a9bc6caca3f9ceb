"""Judge: the LLM as a language model of speech, in torch.

In: rival readings of a row as tokens of plain text. Out: log p of each after the plain text that
the row has said. The LLM's weights are those that write captions; what tells it that plain text
follows are K and V of some places before it, trained for that (prefix tuning, Li and Liang, 2021;
`training.prefix`). Contract: what a row is told depends on its own text alone; places apart, in
which readings are read, are nobody's. `onnx_cpu.judge` does the same in fewer passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparqle_stream import llm as llm_stage
from sparqle_stream.errors import ModelError
from sparqle_stream.plain_text import MOST_APART, MOST_READ, PlainText

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparqle_stream.config import LlmConfig
    from sparqle_stream.llm import Llm, LlmState

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
        """state: of `n_slots(n_rows)` slots."""
        self.llm, self.state, self.n_rows = llm, state, n_rows
        device, dtype = state.k.device, state.k.dtype
        self._n_places = prefix.n_places
        self._bias = prefix.bias.to(device)
        self._ids = prefix.ids.to(device)
        head = llm.tokens if llm.head is None else llm.head
        self._head: Tensor = head.get_parameter("weight").detach()
        self._used = self._head[self._ids]
        self.plain = PlainText(n_rows, state.k.shape[3], bos_id)
        self._length = [prefix.n_places] * n_rows
        state.k[:, n_rows:, :, : prefix.n_places] = prefix.k.to(device, dtype)[:, None]
        state.v[:, n_rows:, :, : prefix.n_places] = prefix.v.to(device, dtype)[:, None]
        state.length[n_rows:] = prefix.n_places

    def wipe(self, row: int) -> None:
        self.plain.wipe(row)

    def say(self, row: int, ids: list[int]) -> None:
        """The row's plain text goes on with ids."""
        self.plain.say(row, ids)

    @torch.inference_mode()
    def judge(self, doubts: Mapping[int, list[list[int]]]) -> dict[int, list[float]]:
        """log p of each row's readings after its plain text."""
        return {row: self._judge(row, readings) for row, readings in doubts.items()}

    def _judge(self, row: int, readings: list[list[int]]) -> list[float]:
        self._catch_up(row)
        cut = [ids[:MOST_READ] for ids in readings[:MOST_APART]]
        n_tokens = max(map(len, cut))
        ids = torch.zeros(len(cut), n_tokens, dtype=torch.int64, device=self._ids.device)
        for place, reading in enumerate(cut):
            ids[place, : len(reading)] = torch.tensor(reading)
        first = self.state.hidden[self.n_rows + row].expand(len(cut), 1, -1)
        before = torch.cat([first, self._read_apart(row, ids[:, :-1])], dim=1)
        log_probs = self._log_probs(before, ids)
        return [float(of[: len(reading)].sum()) for of, reading in zip(log_probs, cut, strict=True)]

    def _catch_up(self, row: int) -> None:
        text = self.n_rows + row
        ids, is_new = self.plain.take(row, self._length[row])
        if is_new:
            self._length[row] = self.state.length[text] = self._n_places
        if ids:
            device = self._ids.device
            slots, tokens = torch.tensor([text], device=device), torch.tensor([ids], device=device)
            llm_stage.append_rows(self.llm, self.state, self.llm.embed(tokens), slots)
            self._length[row] += len(ids)

    def _read_apart(self, row: int, ids: Tensor) -> Tensor:
        """ids (N, R) behind a row's plain text, padded on the right -> hidden (N, R, E)."""
        state, text, start, n = self.state, self.n_rows + row, self._n_places, self._length[row]
        if not ids.shape[1]:
            return state.hidden.new_zeros(len(ids), 0, state.hidden.shape[1])
        apart = torch.arange(2 * self.n_rows, 2 * self.n_rows + len(ids), device=ids.device)
        for array in (state.k, state.v):
            array[:, apart, :, start:n] = array[:, text : text + 1, :, start:n]
        state.length[apart] = n
        x = llm_stage.through_layers(self.llm, state, self.llm.embed(ids), apart)
        hidden: Tensor = self.llm.norm(x)
        return hidden

    def _log_probs(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """hidden (N, R, E) before each of ids (N, R) -> log-probabilities (N, R)."""
        logits = (hidden * self._head[ids]).float().sum(dim=-1) + self._bias[ids]
        every = torch.nn.functional.linear(hidden, self._used).float() + self._bias[self._ids]
        return logits - every.logsumexp(dim=-1)


def n_slots(prefix: TextPrefix | None, n_rows: int) -> int:
    """Slots of an LLM's state: each row's captions, its plain text, and places apart."""
    return n_rows if prefix is None else 2 * n_rows + MOST_APART
