"""Captions that the LLM's adapters must not unlearn while they are taught text.

Rows of training.joint, as its bridge hears and writes them, each with the hidden states that the
LLM has where it decides on a token or on stopping. These states stay what they were, or are paid
for (distillation of hidden states, Romero et al., 2015, from the adapters as they were before).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparqle_stream.llm import Llm
    from training.joint import Trainer

NOTHING_SAID = 0.3  # share of the rows without a word that are kept
MOST_EMPTY = 50  # batches without a row, one after another


@dataclass(frozen=True, slots=True)
class CaptionsConfig:
    joint: str = ""  # config of training.joint; `init` has the adapters. None: they do not learn
    rows: int = 240  # which are heard before the first step
    together: int = 3  # rows of a step that asks for them
    every: int = 3  # steps
    weight: float = 15.0  # of what changed, beside nats a token
    lr: float = 7e-4  # of the adapters

    def __post_init__(self) -> None:
        if not (1 <= self.together <= self.rows and self.every >= 1):
            raise ConfigError(
                f"rows = {self.rows}, together = {self.together}, every = {self.every}",
                hint="1 or more, and no more rows together than there are",
            )


@dataclass(frozen=True, slots=True)
class Caption:
    """A row of N places, at R of which something is decided."""

    embeds: Tensor  # (N, E)
    at: Tensor  # (R,) int64
    hidden: Tensor  # (R, E), as it shall stay


@torch.no_grad()
def hear_captions(joint: Trainer, n_rows: int) -> list[Caption]:
    """The first n_rows rows of the batches that a run of `joint` would have.

    Raises ConfigError where words cannot be told from the audio.
    """
    joint.seed()
    found: list[Caption] = []
    n_empty = 0
    with tqdm(total=n_rows, desc="captions", unit="row") as bar:
        while len(found) < n_rows:
            made = _hear_batch(joint)
            n_empty = 0 if made else n_empty + 1
            if n_empty == MOST_EMPTY:
                raise ConfigError(
                    "no words were found in the audio", hint="is it the ear that heard these packs?"
                )
            found += made
            bar.update(min(len(found), n_rows) - bar.n)
    return found[:n_rows]


def _hear_batch(joint: Trainer) -> list[Caption]:
    queries, rows = joint.hear_batch()
    if not rows:
        return []
    embeds = joint.embed_rows(queries, rows)
    with joint.place.autocast():
        hidden = joint.bridge.llm.forward_train(embeds)
    found = []
    for i, row in enumerate(rows):
        if row.text_at or joint.rng.random() < NOTHING_SAID:
            at = torch.tensor(sorted({*row.text_at, *row.stop_at}), device=hidden.device)
            read = embeds[i, : len(row.items)].clone()
            found.append(Caption(read, at, hidden[i, at].clone()))
    return found


def change(llm: Llm, captions: Sequence[Caption]) -> Tensor:
    """How far hidden states are from what they were, squared, as a share of their size."""
    hidden = llm.forward_train(pad_sequence([caption.embeds for caption in captions], True))
    now = torch.cat([hidden[i, caption.at] for i, caption in enumerate(captions)]).float()
    before = torch.cat([caption.hidden for caption in captions]).float()
    return ((now - before).square().sum(dim=-1) / before.square().sum(dim=-1)).mean()
