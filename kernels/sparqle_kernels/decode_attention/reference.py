"""Reference of `decode_attention`: plain PyTorch, the truth that other implementations answer to.

Runs on any device and never waits for it: unequal lengths are a mask over whole slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Plan:
    """What all layers of one pass share."""

    slots: Tensor  # (B,)
    last_seen: Tensor  # (B, R) the entry of the slot that each row is

    @classmethod
    def of(cls, slots: Tensor, lengths: Tensor, n_rows: int, n_groups: int) -> Plan:
        del n_groups  # of heads that share keys: only packing asks for it
        row = torch.arange(n_rows, device=lengths.device)
        return cls(slots, lengths[:, None] - n_rows + row)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, R, d), k and v (S, KV, N, d) -> (B, H, R, d)."""
        seen = torch.arange(k.shape[2], device=k.device) <= self.last_seen[..., None]  # (B, R, N)
        return scaled_dot_product_attention(
            q, k[self.slots], v[self.slots], attn_mask=seen[:, None], enable_gqa=True
        )
