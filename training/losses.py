"""Losses. SparQLe's first stage: what the answers of a Q-Former have to do with a text, after
BLIP-2 (Li et al., 2023) and SparQLe (Djanibekov and Aldarmaki, 2025): contrastive, matching and
generation. And for the ear: whether two views of the same speech are heard alike.

Pure functions of features and logits, of queries of any kind, streaming ones too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

SMOOTHING = 0.1


def similarity(speech: Tensor, text: Tensor) -> Tensor:
    """speech (B, Q, D), text (C, D) -> (B, C): the cosine of the query that fits best."""
    speech, text = F.normalize(speech, dim=-1), F.normalize(text, dim=-1)
    return torch.einsum("bqd,cd->bcq", speech, text).amax(dim=-1)


def same(names: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """(B, B) bool: which rows are of one name, and so no negatives of each other.

    >>> same(["a", "b", "a"]).int().tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    row = torch.tensor([number[name] for name in names], device=device)
    return row[:, None] == row[None]


def contrastive(
    scores: Tensor, temperature: Tensor, is_same: Tensor, smoothing: float = SMOOTHING
) -> Tensor:
    """Cross-entropy both ways: speech finds its text, and text its speech.

    scores (B, B) of `similarity`, temperature () learned, is_same (B, B): pairs count as right
    where it is true; `smoothing` of the target is spread over the batch.
    """
    right = is_same.to(scores.dtype)
    target = right / right.sum(dim=1, keepdim=True)
    target = (1 - smoothing) * target + smoothing / scores.shape[1]
    logits = scores / temperature
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def hard_negatives(
    scores: Tensor, is_same: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """For every row of scores (B, C) a column that is not its own (B,), drawn by exp(score).

    A row for which all are its own gets any: nothing better is in the batch.
    """
    allowed = torch.where(is_same, -torch.inf, scores.detach().float())
    allowed = torch.where(is_same.all(dim=1, keepdim=True), 0.0, allowed)
    weights = allowed.softmax(dim=1).cpu()
    return torch.multinomial(weights, 1, generator=generator)[:, 0].to(scores.device)


def matching(logits: Tensor, is_pair: Tensor) -> Tensor:
    """logits (N, K, 2) of K positions, which are averaged, is_pair (N,) bool -> cross-entropy."""
    return F.cross_entropy(logits.mean(dim=1), is_pair.long())


def generation(logits: Tensor, targets: Tensor, pad: int) -> Tensor:
    """logits (B, L, V) of the tokens (B, L) that follow; those that are `pad` do not count."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=pad)


def consistency(log_probs: Tensor, other: Tensor) -> Tensor:
    """How far two posteriors (..., V) of the same frames are apart, nats a frame.

    Both ways, each towards what the other said, which is a target and learns nothing by it
    (CR-CTC, Yao et al., 2024).
    """
    apart = [
        F.kl_div(x, target.detach(), reduction="none", log_target=True).sum(dim=-1).mean()
        for x, target in ((log_probs, other), (other, log_probs))
    ]
    return 0.5 * (apart[0] + apart[1])
