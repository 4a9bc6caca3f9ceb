"""`decode_attention` for a CPU, where calls and copies are what costs.

A few slots are read one by one, in place and no further than they are filled; many slots at once,
in place when they lie behind each other. Heads that share keys are packed as rows of one head, so
that keys are read once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

FEW_SLOTS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """What all layers of one pass share: slots that are read in one call, and what they may see."""

    parts: list[tuple[slice | Tensor, int, Tensor | None]]  # slots, longest, mask (b, 1, G R, n)

    @classmethod
    def of(cls, slots: Tensor, lengths: Tensor, n_rows: int, n_groups: int) -> Plan:
        host_slots, host_lengths = slots.tolist(), lengths.tolist()
        if len(host_slots) <= FEW_SLOTS:
            pairs = zip(host_slots, host_lengths, strict=True)
            return cls([(slice(s, s + 1), n, _mask([n], n_rows, n_groups)) for s, n in pairs])
        block = range(host_slots[0], host_slots[0] + len(host_slots))
        where = slice(block.start, block.stop) if host_slots == list(block) else slots
        return cls([(where, max(host_lengths), _mask(host_lengths, n_rows, n_groups))])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, R, d), k and v (S, KV, N, d) -> (B, H, R, d)."""
        packed = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, KV, G R, d)
        out, row = [], 0
        for where, longest, mask in self.parts:
            keys, values = k[where, :, :longest], v[where, :, :longest]
            queries = packed[row : row + len(keys)]
            out.append(scaled_dot_product_attention(queries, keys, values, attn_mask=mask))
            row += len(keys)
        return (out[0] if len(out) == 1 else torch.cat(out)).reshape(q.shape)


def _mask(lengths: list[int], n_rows: int, n_groups: int) -> Tensor | None:
    """(b, 1, G R, longest) bool: row r of a slot sees entries up to length - R + r. None: all."""
    if n_rows == 1 and len(set(lengths)) == 1:
        return None
    last_seen = torch.tensor(lengths)[:, None] - n_rows + torch.arange(n_rows)  # (b, R)
    seen = torch.arange(max(lengths)) <= last_seen[..., None]
    return seen.repeat(1, n_groups, 1)[:, None]
