"""Ahead-of-time compilation and the pages that commands write: gates, counts, up to date."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparqle_kernels import aot, report, roofline
from sparqle_kernels.aot import Compiled
from sparqle_kernels.cases import CASES
from sparqle_kernels.launch import Launch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FINE = Compiled(80, n_registers=96, n_spilled_bytes=0, shared_bytes=40_000, n_mma=8, n_threads=128)
PRODUCTS = {case.op for case in CASES if case.has_products}


def test_what_is_fine_passes_every_gate():
    assert FINE.faults(wants_mma=True) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"n_spilled_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 170_000}, "170000 bytes of shared memory are too many"),
        ({"n_registers": 255, "n_threads": 512}, "255 registers are too many for 512 threads"),
        ({"n_mma": 0}, "no tensor-core instructions"),
    ],
)
def test_each_gate_refuses(change, fault):
    assert replace(FINE, **change).faults(wants_mma=True) == [fault]


def test_shared_memory_depends_on_the_architecture():
    large = replace(FINE, shared_bytes=120_000)
    assert not large.faults(wants_mma=True)
    assert replace(large, capability=120).faults(wants_mma=True)


def test_arguments_are_specialised_as_triton_does():
    """Ones become constants, multiples of 16 are told, long strides are 64 bits wide."""
    names = ["x", "seen", "n", "one", "stride", "scale", "TILE"]
    launch = Launch(
        SimpleNamespace(arg_names=names),
        (1,),
        {
            "x": torch.empty(3, dtype=torch.bfloat16, device="meta"),
            "seen": torch.empty(3, dtype=torch.bool, device="meta"),
            **{"n": 100, "one": 1, "stride": 2**31, "scale": 0.5},
        },
        {"TILE": 64},
    )
    signature, constants, attributes = aot.specialise(launch)
    types = ["*bf16", "*i1", "i32", "constexpr", "i64", "fp32", "constexpr"]
    assert signature == dict(zip(names, types, strict=True))
    assert constants == {"one": 1, "TILE": 64}
    assert set(attributes) == {(0,), (1,), (4,)}


def rows_of_readme() -> list[list[str]]:
    page = (KERNELS / "README.md").read_text()
    table = page.partition(report.BEGIN)[2].partition(report.END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_the_committed_table_has_every_op_shape_and_type():
    there = {(kernel, case, dtype) for kernel, case, dtype, *_ in rows_of_readme()}
    for case in CASES:
        for dtype in case.dtypes:
            wanted = (case.label, str(dtype).removeprefix("torch."))
            found = [kernel for kernel, *rest in there if tuple(rest) == wanted]
            assert [k for k in found if k.startswith(case.op)], (case.op, *wanted)


def test_no_row_of_the_committed_table_spills_or_misses_the_tensor_cores():
    for kernel, case, dtype, spills, *compiled in rows_of_readme():
        assert spills == "0", (kernel, case, dtype)
        assert len(compiled) == len(aot.SHARED_LIMIT)
        is_product = any(kernel.startswith(op) for op in PRODUCTS)
        if is_product and dtype != "float32" and not kernel.endswith(("_merge", "_delta")):
            assert all(int(cell.split(" / ")[2]) > 0 for cell in compiled), (kernel, case, dtype)


def test_the_roofline_page_is_what_the_command_writes():
    page = (KERNELS / "ROOFLINE.md").read_text()
    assert page == report.put_between(page, roofline.BEGIN, roofline.END, roofline.page([]))


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="begin"):
        report.put_between("nothing", report.BEGIN, report.END, "text")


def test_counts_by_hand():
    """One stream, bf16: what the shipped chunk moves and computes, added up on paper."""
    chunk = CASES[0].build(1, torch.bfloat16, "meta")
    ring, own = 8 * 256 * 64 * 2, 8 * 16 * 64 * 2
    assert chunk.n_bytes == 2 * ring + 4 * own + 256 * 8 + 8  # positions, and whose ring it is
    assert chunk.n_flops == 2 * 2 * 8 * 16 * 272 * 64
    for case in CASES:
        problem = case.build(1, torch.bfloat16, "meta")
        assert 0 < problem.n_bytes < problem.unfused_bytes, case


def test_a_bound_is_the_longer_of_memory_and_arithmetic():
    problem = CASES[0].build(1, torch.bfloat16, "meta")
    gpu = roofline.Gpu("slow", problem.n_bytes / 2.0, problem.n_flops / 3.0, problem.n_flops / 1.0)
    assert roofline.bound_s(problem, gpu, on_tensor_cores=True) == (3.0, "arithmetic")
    assert roofline.bound_s(problem, gpu, on_tensor_cores=False) == (2.0, "memory")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_command_compiles_here(tmp_path):
    """In a process of its own: this one interprets. One small op, as it stands in the table."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(KERNELS)}
    command = [sys.executable, "-m", "sparqle_kernels.report", "stop_head", "--arch", "90"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = re.findall(
        r"^\| `stop_head_fwd` \| width 576 \| (\w+) \| 0 \| (\d+) / ", run.stdout, re.M
    )
    assert [dtype for dtype, _ in rows] == ["float32", "float16", "bfloat16"]
