"""bench.kernels: no GPU and no figures, wrong results and no figures, and honest shares."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from bench import kernels, kernels_rivals
from sparqle_kernels.cases import CASES
from sparqle_stream.errors import ConfigError

pytestmark = pytest.mark.usefixtures("idle")

STOP_HEAD = next(case for case in CASES if case.op == "stop_head")


@pytest.fixture
def small(monkeypatch):
    """As if a GPU were here: rates of small tensors, kernels that are their reference."""
    monkeypatch.setattr(kernels, "COPIED_BYTES", 1 << 10)
    monkeypatch.setattr(kernels, "MATRIX_SIDE", 16)
    monkeypatch.setattr(kernels, "MAX_COPIES", 2)
    monkeypatch.setattr(
        kernels, "tensors_of", lambda case, problem: kernels_rivals.EAGER[case.op](*problem.args)
    )


def timer(call):
    """Runs it once and says that it took 2 ms."""
    call()
    return 2.0


def arguments(*argv):
    return kernels.parser().parse_args(argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert kernels.main([]) == kernels.EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    first, hint = captured.err.splitlines()
    assert first == "error: no CUDA device here: kernels are timed on a GPU only"
    assert hint.startswith("hint: python -m sparqle_kernels.report")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.label}")
def test_every_rival_computes_the_same(case):
    """The written-out mathematics and PyTorch's fused attention agree in float64."""
    if case.op == "utterance_attention":
        problem = case.build(1, torch.float64, "cpu")
        args = tuple(x[:, :, :40] for x in problem.args[:4]) + (16, 8)
    else:
        args = kernels_rivals.in_float64(case.build(2, torch.float64, "cpu").args)
    eager = kernels_rivals.EAGER[case.op](*args)
    assert all(x.is_floating_point() or x.dtype == torch.bool for x in eager)
    if case.op in kernels_rivals.SDPA:
        fused = kernels_rivals.SDPA[case.op](*args)
        for one, other in zip(eager, fused, strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.usefixtures("small")
def test_red_gives_no_figures(monkeypatch, capsys):
    """A kernel that is off by a thousandth stops everything, and says which it was."""
    right = kernels.tensors_of
    monkeypatch.setattr(
        kernels, "tensors_of", lambda case, problem: [x * 1.001 for x in right(case, problem)]
    )
    monkeypatch.setattr(kernels, "require_gpu", dict)
    monkeypatch.setattr(kernels, "time_case", lambda *args: pytest.fail("timed a wrong kernel"))
    monkeypatch.setattr(kernels, "do_bench", timer)
    run = kernels.run
    monkeypatch.setattr(kernels, "run", lambda args, do_bench, _: run(args, do_bench, "cpu"))
    assert kernels.main(["add_layer_norm"]) == kernels.EXIT_RED
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["is_green"] is False
    assert "rows" not in result
    assert "add_layer_norm, 16 rows of 512, float32" in captured.err


@pytest.mark.usefixtures("small")
def test_green_gives_times_and_shares_of_measured_rates():
    result = kernels.run(arguments("stop_head", "--streams", "2"), timer, "cpu")
    assert [check["dtype"] for check in result["checks"]] == list(kernels.DTYPES)
    assert result["is_green"] is True
    (row,) = result["rows"]
    assert row["ms"] == {"triton": 2.0, "eager": 2.0}
    assert row["speedup"] == 1.0
    n_bytes = STOP_HEAD.build(2, torch.bfloat16, "meta").n_bytes
    # the copy moved 2048 bytes in the same 2 ms
    assert row["share_of_copy"] == round(n_bytes / 2048, 3)


@pytest.mark.usefixtures("small")
def test_a_limit_keeps_what_was_timed_and_says_what_was_not():
    """A row is not started after the limit; results that are there are not lost to a timeout."""
    args = arguments("stop_head", "--streams", "1", "2", "--limit-s", "0")
    result = kernels.run(args, timer, "cpu")
    assert (result["is_green"], result["rows"], result["rows_left_out"]) == (True, [], 2)


def test_rows_go_by_streams_so_that_a_limit_hits_all_ops_alike():
    rows = kernels.wanted_rows(CASES, arguments("--streams", "256", "8"))
    numbers = [streams for _, streams, _ in rows]
    assert numbers == sorted(numbers, reverse=True)
    assert {case.op for case, streams, _ in rows if streams == 8} == {"utterance_attention"}
    assert {str(dtype) for case, _, dtype in rows if case.op == "log_mel"} == {"torch.float32"}


def test_a_rival_that_runs_out_of_memory_is_left_out(small):
    calls = []

    def scarce(call):
        calls.append(call)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return 1.0

    row = kernels.time_case(STOP_HEAD, 2, torch.float32, scarce, "cpu")
    assert row["ms"] == {"triton": 1.0, "eager": None}
    assert kernels.with_shares(row, 1.0, 1.0)["speedup"] is None


def test_an_unknown_op_is_an_error():
    with pytest.raises(ConfigError, match="no such op: chunk_atention"):
        kernels.run(arguments("chunk_atention"), timer, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_unattended_script_stops_before_it_writes_anything(tmp_path):
    script = kernels.machine.REPO / "bench" / "on_gpu.sh"
    env = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(script), str(tmp_path / "out")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: no CUDA device here\nhint: ")
    assert not (tmp_path / "out").exists()


def test_inputs_rotate():
    call = kernels.rotating(lambda problem: problem, [1, 2])
    assert [call() for _ in range(3)] == [1, 2, 1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="`python -m bench.kernels` does it here")
def test_the_comparison_is_green_in_the_interpreter():
    from sparqle_kernels.launch import is_interpreted
    from sparqle_kernels.stop_head import triton

    if not is_interpreted(triton.stop_head_fwd):
        pytest.skip("Triton was imported before the tests could ask for its interpreter")
    check = kernels.check(STOP_HEAD, torch.float16, "cpu")
    assert check.is_green
    assert 0 < check.error <= 2 * check.error_of_pytorch
