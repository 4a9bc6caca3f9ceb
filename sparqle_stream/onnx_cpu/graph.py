"""Graph: a small builder of ONNX graphs, with the few layers that all stages are made of.

Names of values are made here; a graph is written with its weights in one file beside it, which ONNX
Runtime maps into memory instead of copying it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

OPSET, IR_VERSION = 21, 10
CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
CONTRIB_OPS = frozenset(
    [
        "BiasGelu",
        "FusedMatMul",
        "GroupQueryAttention",
        "MatMulIntegerToFloat",
        "QuickGelu",
    ]
)
FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32
FLOAT16, INT8 = TensorProto.FLOAT16, TensorProto.INT8
ZERO, LARGEST = 128, 127  # of rows of input in 8 bits without a sign
# Of a row of weights: 7 bits. Without VNNI two products are added in 16 bits: 255 * 63 * 2 fits.
LARGEST_WEIGHT = 63
EXTERNAL_BYTES = 4096  # weights from this size on lie in the file beside the graph


def quantize_rows(weight: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """weight (out, in) -> whole numbers (out, in) of at most 63, and a scale for each output."""
    scale = np.maximum(np.abs(weight).max(axis=1) / LARGEST_WEIGHT, 1e-12).astype(np.float32)
    q: npt.NDArray[np.int8] = np.rint(weight / scale[:, None]).astype(np.int8)
    return q, scale


class Graph:
    """One graph in the making; every method that makes a value returns its name.

    is_int8: `linear` multiplies whole numbers, and rings are kept in float16.
    """

    def __init__(self, name: str, *, is_int8: bool = False) -> None:
        self.name = name
        self._is_int8 = is_int8
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._n_values = 0

    # --- values ----------------------------------------------------------------------------------

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, value: str, shape: Sequence[int | str]) -> None:
        """`value` leaves the graph as the float32 output `name`."""
        self.add("Identity", value, outputs=[name])
        self._outputs.append(helper.make_tensor_value_info(name, FLOAT, shape))

    def declare(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """An output that some node will write under this name itself."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def ring(self, name: str, shape: Sequence[int | str]) -> str:
        """A ring's input, in float32 for what reads it."""
        if not self._is_int8:
            return self.input(name, FLOAT, shape)
        return str(self.add("Cast", self.input(name, FLOAT16, shape), to=FLOAT))

    def const(self, value: Array | float | Sequence[int], kind: type | None = None) -> str:
        """A constant: arrays as they are, whole numbers as int64, others as float32."""
        array = np.asarray(value, kind)
        if kind is None and array.dtype == np.float64:
            array = array.astype(np.float32)
        name = self._new("c")
        self._weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, op: str, *inputs: str, outputs: list[str] | int = 1, **attributes: Any) -> Any:  # noqa: ANN401 - one name, or as many as asked for
        """A node; the name of its output, or a list of them. An input "" is left out."""
        names = [self._new(op) for _ in range(outputs)] if isinstance(outputs, int) else outputs
        domain = CONTRIB if op in CONTRIB_OPS else ""
        self._nodes.append(helper.make_node(op, inputs, names, domain=domain, **attributes))
        return names[0] if len(names) == 1 else names

    def _new(self, hint: str) -> str:
        self._n_values += 1
        return f"{hint}_{self._n_values}"

    # --- shapes ----------------------------------------------------------------------------------

    def size(self, x: str, axis: int) -> str:
        """Length of an axis, as a (1,) int64."""
        return str(self.add("Shape", x, start=axis, end=axis + 1))

    def count(self, n: str) -> str:
        """0 .. n - 1 as int64, n (1,)."""
        scalar = self.add("Squeeze", n)
        return str(self.add("Range", self.const(0), scalar, self.const(1)))

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps an axis, -1 takes what is left."""
        return str(self.add("Reshape", x, self.const(list(shape))))

    def transpose(self, x: str, *order: int) -> str:
        return str(self.add("Transpose", x, perm=list(order)))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return str(self.add("Unsqueeze", x, self.const(list(axes))))

    def slice(self, x: str, start: int, end: int, axis: int) -> str:
        at = (self.const([number]) for number in (start, end, axis))
        return str(self.add("Slice", x, *at))

    def first(self, x: str, n: str, axis: int) -> str:
        """x up to n (1,) of an axis."""
        return str(self.add("Slice", x, self.const([0]), n, self.const([axis])))

    def concat(self, *parts: str, axis: int) -> str:
        return str(self.add("Concat", *parts, axis=axis))

    # --- layers ----------------------------------------------------------------------------------

    def linear(self, x: str, weight: Floats, bias: Floats | None = None) -> str:
        """x (..., in) times weight (out, in), in float32 or in whole numbers."""
        if self._is_int8:
            y = self._int8_product(x, weight)
        else:
            y = str(self.add("MatMul", x, self.const(weight.T)))
        return y if bias is None else str(self.add("Add", y, self.const(bias)))

    def _int8_product(self, x: str, weight: Floats) -> str:
        """Every row of x is rounded to 8 bits by its own largest number: rows share no scale.

        Sums of whole numbers are exact: how many rows there are changes nothing either.
        """
        q, scale = quantize_rows(weight)
        largest = self.add("ReduceMax", self.add("Abs", x), self.const([-1]), keepdims=1)
        zero = self.const(ZERO, np.uint8)
        # A row of zeros becomes whatever 0 / 0 is in whole numbers, and is multiplied by 0 below.
        share = self.add("Div", x, largest)
        whole = self.add("QuantizeLinear", share, self.const(1.0 / LARGEST), zero)
        scales = self.const(1.0), self.const(scale / LARGEST)
        y = self.add("MatMulIntegerToFloat", whole, self.const(q.T), *scales, zero)
        return str(self.add("Mul", y, largest))

    def windows(self, x: str, width: int, stride: int) -> str:
        """x (B, T, D) -> (B, (T - width) / stride + 1, width D): so many rows side by side."""
        ends = [self.add("Sub", self.size(x, 1), self.const([width - 1 - i])) for i in range(width)]
        axis, step = self.const([1]), self.const([stride])
        parts = [
            self.add("Slice", x, self.const([i]), end, axis, step) for i, end in enumerate(ends)
        ]
        return self.concat(*parts, axis=-1)

    def heads(self, x: str, n_heads: int) -> str:
        """x (B, T, H d) -> (B, H, T, d)."""
        return self.transpose(self.reshape(x, 0, 0, n_heads, -1), 0, 2, 1, 3)

    def merged(self, x: str) -> str:
        """x (B, H, T, d) -> (B, T, H d)."""
        return self.reshape(self.transpose(x, 0, 2, 1, 3), 0, 0, -1)

    def scores(self, q: str, k: str) -> str:
        """q (B, H, T, d), k (B, H, L, d) -> (B, H, T, L)."""
        return str(self.add("FusedMatMul", q, k, transB=1))

    # --- writing ---------------------------------------------------------------------------------

    def model(self) -> Any:  # noqa: ANN401 - onnx.ModelProto, which has no types
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, self._weights
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def save(self, folder: Path) -> None:
        """`name`.onnx and `name`.data into the folder."""
        onnx.save_model(
            self.model(),
            folder / f"{self.name}.onnx",
            save_as_external_data=True,
            location=f"{self.name}.data",
            size_threshold=EXTERNAL_BYTES,
        )
