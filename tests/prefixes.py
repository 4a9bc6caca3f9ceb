"""A prefix for plain text of the tiny model: K and V of tokens that it has really read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparqle_stream import llm as llm_stage
from sparqle_stream.judge import TextPrefix

if TYPE_CHECKING:
    from sparqle_stream.torch_model import SparqleModel

BEFORE = [1, 70, 71, 80, 102]  # what the prefix stands for
USED = list(range(1, 200))  # tokens of plain text; letters are among them


def prefix_of(model: SparqleModel, bias: float = 0.5) -> TextPrefix:
    """The model then judges as if `BEFORE` stood before everything that is said."""
    state = llm_stage.init_state(model.cfg.llm, 1)
    state = llm_stage.prefill(model.llm, state, [BEFORE])
    n = len(BEFORE)
    ids = torch.tensor(USED)
    biases = torch.zeros(model.cfg.llm.vocab)
    biases[ids] = bias * torch.randn(len(ids), generator=torch.Generator().manual_seed(0))
    return TextPrefix(state.k[:, 0, :, :n].clone(), state.v[:, 0, :, :n].clone(), ids, biases)
