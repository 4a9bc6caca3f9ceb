"""Compiling launches for GPUs that are not here, and what the machine code looks like.

Triton carries LLVM and ptxas, so a machine without a GPU can tell how many registers a kernel
takes, whether it spills them, how much shared memory it wants and whether its products run on
tensor cores. What it cannot tell is speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from sparqle_kernels.launch import Launch

# Compute capability -> shared memory that one program may have, in bytes (CUDA guide, table of
# technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}
GPUS = {80: "A100", 90: "H100, H200", 120: "RTX 50"}
REGISTERS_PER_SM = 65_536


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel on one architecture."""

    capability: int
    n_registers: int  # of a thread
    n_spilled_bytes: int  # of registers that did not fit, in memory
    shared_bytes: int  # of a program
    n_mma: int  # tensor-core instructions in the code
    n_threads: int  # of a program

    def faults(self, *, wants_mma: bool) -> list[str]:
        """What a gate refuses; empty when all is well."""
        found = []
        if self.n_spilled_bytes:
            found.append(f"spills {self.n_spilled_bytes} bytes")
        if self.shared_bytes > SHARED_LIMIT[self.capability]:
            found.append(f"{self.shared_bytes} bytes of shared memory are too many")
        if self.n_registers * self.n_threads > REGISTERS_PER_SM:
            found.append(f"{self.n_registers} registers are too many for {self.n_threads} threads")
        if wants_mma and not self.n_mma:
            found.append("no tensor-core instructions")
        return found


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """The launch for an architecture (80, 90, 120), specialised as running it would be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=launch.options)
    ptx = built.asm["ptx"]
    n_registers, n_spilled = _resources(built.asm["cubin"])
    n_mma = len(re.findall(r"^\s*(?:@\S+\s+)?(?:wgmma\.mma_async|mma\.sync)", ptx, re.M))
    shared = int(built.metadata.shared)
    return Compiled(capability, n_registers, n_spilled, shared, n_mma, 32 * launch.n_warps)


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types, constants and hints of the parameters, as Triton derives them from arguments.

    An integer 1 becomes a constant; multiples of 16, and pointers of whole tensors, are told to
    be such, which is what lets loads be wide.
    """
    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.args[name]
        if isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int) and value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = _type_of(value)
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: Tensor | int) -> str:
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "bool": "i1"}
    name = str(value.dtype).removeprefix("torch.")
    return "*" + names.get(name, name.replace("int", "i"))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, where spilled registers go."""
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(cuobjdump), "-res-usage", str(file)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ((n_registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    return int(n_registers), int(stack) + int(local)
