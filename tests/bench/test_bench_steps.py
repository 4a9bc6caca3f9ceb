"""bench.steps on a CPU: tiny weights, a fake graph; figures are not looked at, only their sense."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

import pytest
import torch

from bench import report, steps
from bench.machine import REPO
from bench.tables import Machines

pytestmark = pytest.mark.usefixtures("idle")


def arguments(*argv):
    return steps.parser().parse_args(["--model", "random:tiny", "--compute", "cpu", *argv])


def test_every_number_of_streams_with_and_without_graphs():
    result = steps.run(
        arguments("--fake", "--streams", "3", "1", "--steps", "4", "--seconds", "60")
    )
    assert [(r["streams"], r["graphs"]) for r in result["rows"]] == [
        (3, True),
        (3, False),
        (1, True),
        (1, False),
    ]
    assert result["left_out"] == []
    assert result["is_fake"]
    for row in result["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["n_steps"] == 4
        # one for what was heard, two for each round of writing: 1, 1, 1 and 2 rounds
        assert row["waits_of_a_step"] == (1 + 2 * 1.25 if row["graphs"] else 0.0)
    json.dumps(result)


def test_slots_begin_anew_before_they_are_full(monkeypatch):
    model = steps.random_model("random:tiny", "float32", "cpu")
    model.cfg = replace(model.cfg, llm=replace(model.cfg.llm, n_slot=64))
    run = steps.Run(model, 2, None, 1280)
    begun = []
    inner = run.begin
    monkeypatch.setattr(run, "begin", lambda: (begun.append(run.n_rows), inner()))
    with run.stages.working(0):
        for _ in range(6):
            run.step_seconds()
            assert int(run.stages.state.llm.length.max()) == run.n_rows
    # a prefix of 2, then 16 queries and a token each: a fourth chunk would not fit
    assert begun == [0, 53]


def test_what_takes_too_long_is_left_out_and_said():
    result = steps.run(arguments("--streams", "1", "2", "--limit-s", "0"))
    assert result["rows"] == []
    assert [row["why"] for row in result["left_out"]] == ["after 0 s", "after 0 s"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys):
    assert steps.main([]) == 2
    assert capsys.readouterr().err.startswith("error: no CUDA device here\nhint: ")


def test_the_default_shape_is_the_default_models():
    model = steps.random_model("default", "bfloat16", "meta")
    assert 130e6 < sum(p.numel() for p in model.llm.parameters()) < 140e6


def test_the_page_has_a_section():
    row = {"streams": 16, "graphs": True, "p50_ms": 2.0, "p95_ms": 3.0, "waits_of_a_step": 3.5}
    row |= {"is_real_time": True, "n_steps": 9, "begin_ms": 1.0, "warm_up_s": 1.0, "state_mb": 5.0}
    eager = row | {"graphs": False, "p50_ms": 6.0}
    result = {
        "bench": "steps",
        "settings": {"model": "default", "dtype": "bfloat16", "chunk_ms": 320},
        "device": "a GPU",
        "is_fake": False,
        "rows": [row, eager],
    }
    page = "\n".join(report._SECTIONS["steps"]([("steps.json", result)], Machines()))
    assert "| 16 | yes | 2.0 | 3.0 |" in page
    assert "| 16 | no | 6.0 | 3.0 |" in page


def test_the_unattended_script_keeps_its_budget():
    """Limits of all parts together stay below nine minutes."""
    script = (REPO / "bench" / "on_gpu.sh").read_text()
    subprocess.run(["bash", "-n", REPO / "bench" / "on_gpu.sh"], check=True)
    lines = [line.split() for line in script.splitlines()]
    limits = [int(words[2]) for words in lines if words[:1] == ["part"] and words[2].isdigit()]
    limits += [int(words[1]) for words in lines if words[:1] == ["timeout"] and words[1].isdigit()]
    assert len(limits) == 5
    assert sum(limits) < 9 * 60
