"""SlotMemory: K/V of the LLM's slots, and its graph bound to neighbours among them.

The graph computes nothing for a slot without new rows, but arranges rows for every slot that it is
given. So a pass is given a block: the fewest slots that hold all it needs, a power of two of them,
from a multiple of that on. There are few blocks, and each is bound once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from sparqle_stream.onnx_cpu.memory import sparse_zeros
from sparqle_stream.onnx_cpu.settings import places

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from sparqle_stream.onnx_cpu.model import OnnxModel
    from sparqle_stream.stages import Floats


class SlotMemory:
    """Arrays (B, KV, N, d) by name, which passes of the graph `llm` write in place."""

    def __init__(self, model: OnnxModel, n_slots: int) -> None:
        cfg = model.cfg.llm
        shape = (n_slots, cfg.n_kv_heads, places(cfg.n_slot), cfg.head_width)
        kind, layers = model.kind("llm", "k_0"), range(cfg.n_layers)
        self.kv = {f"{part}_{i}": sparse_zeros(shape, kind) for i in layers for part in "kv"}
        self._n_slots = n_slots
        self._session = model.session("llm")
        self._bindings: dict[tuple[int, int], Any] = {}

    def block(self, needed: npt.NDArray[np.int64]) -> slice:
        """The block that holds some places."""
        first, last, size = int(needed.min()), int(needed.max()), 1
        while first // size != last // size:
            size *= 2
        start = first // size * size
        return slice(start, min(start + size, self._n_slots))

    def run(self, block: slice, inputs: Mapping[str, npt.NDArray[Any]]) -> Floats:
        """One pass over a block, of B slots for the graph -> `hidden` (R, E)."""
        key = block.start, block.stop
        if key not in self._bindings:
            self._bindings[key] = self._bind(block)
        binding = self._bindings[key]
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        binding.bind_output("hidden")
        self._session.run_with_iobinding(binding)
        hidden: Floats = binding.get_outputs()[-1].numpy()  # bound last
        return hidden

    def _bind(self, block: slice) -> Any:  # noqa: ANN401 - onnxruntime has no types
        binding = self._session.io_binding()
        for name, array in self.kv.items():
            value = ort.OrtValue.ortvalue_from_numpy(array[block])
            part, layer = name.split("_")
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"{part}_out_{layer}", value)
        return binding
