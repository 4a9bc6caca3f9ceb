"""Where a run computes: its device, its arithmetic, its part of the work of several processes.

One process needs nothing. `accelerate launch` (or torchrun) starts several and sets WORLD_SIZE;
they sum what they learned after every step, so that each holds the same weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import distributed

from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """A device, whether matrices are multiplied in bf16 there, and which process this is of how
    many."""

    device: torch.device
    bf16: bool = False
    index: int = 0
    n_processes: int = 1

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, self.bf16)

    def sum(self, flat: Tensor) -> Tensor:
        """The sum of `flat` (N,) over all processes, in place."""
        if self.n_processes > 1:
            distributed.all_reduce(flat)
        return flat

    def wait(self) -> None:
        """Until all processes are here."""
        if self.n_processes > 1:
            distributed.barrier()


HERE = Place(torch.device("cpu"))


def find_place(device: str = "cpu", bf16: bool | None = None) -> Place:
    """The place of this process. bf16 None: what the device multiplies faster.

    Raises ConfigError for a device that is not there, or when accelerate is missing.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here", hint="leave --device out")
    here, index, n_processes = torch.device(device), 0, 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        try:
            from accelerate import PartialState
        except ImportError as err:
            raise ConfigError(
                "several processes need accelerate", hint="pip install -e '.[train]'"
            ) from err
        state = PartialState(cpu=device == "cpu")
        here, index, n_processes = state.device, state.process_index, state.num_processes
    return Place(here, is_bf16_fast(here) if bf16 is None else bf16, index, n_processes)


def is_bf16_fast(device: torch.device) -> bool:
    """GPUs that know bf16, and CPUs with AMX: one without multiplied bf16 at half the speed of
    float32 (docs/log.md)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
