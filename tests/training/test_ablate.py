"""ablate.py: variants at equal budget, one table; what was finished is not done again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sparqle_stream.errors import ConfigError
from training import ablate, joint
from training.corpus import Pack
from training.sources import Source, clips_of

CONFIGS = Path(ablate.__file__).parent / "configs"
PLAN = """
steps = 2
dev_batches = 2

[base]
ear = "{ear}"
pieces = "{pieces}"
llm = "tiny"
text_steps = 1
text_rows = 2
streams = 2
stream_s = 2.56
rank = 2
n_layers = 1
chunks = [8, 16]
[[base.sources]]
pack = "{pack}"
[[dev]]
pack = "{pack}"

[[variants]]
name = "window"
[[variants]]
name = "stack"
kind = "stack"
[[variants]]
name = "half of all, no posteriors"
merge = 2
posteriors = false
data = 0.5
sinks = 2
[[variants]]
name = "whole LLM"
update = "full"
"""


@pytest.mark.usefixtures("tiny_llm")
def test_a_comparison_is_a_table(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "plan.toml").write_text(PLAN.format(**vars(files)))
    monkeypatch.setattr(joint, "BAD_ALIGNMENT", -99.0)  # an untrained ear fits nothing well
    argv = ["ablate", str(tmp_path / "plan.toml"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", argv)
    ablate.main()
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "work" / "ablation.md").read_text()
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")][1:]
    names = [row[0].removeprefix("| ") for row in rows]
    assert names == [
        "window",
        "stack",
        "half of all, no posteriors",
        "whole LLM",
    ]
    told = json.loads((tmp_path / "work" / "ablation.json").read_text())
    assert all(0 < one["text"] < 99 and 0 <= one["right"] <= 1 for one in told)
    assert told[3]["trained"] > told[0]["trained"] > told[2]["trained"]
    assert sum("**" in row[1] for row in rows) == 1
    trained = []
    monkeypatch.setattr(ablate, "Trainer", lambda *args: trained.append(args))
    monkeypatch.setattr(sys, "argv", [*argv, "--resume"])
    ablate.main()
    assert capsys.readouterr().out == shown
    assert not trained


def test_a_share_of_the_data_is_spread_over_it(files, tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.format(**vars(files)))
    plan = ablate.read_plan(tmp_path / "plan.toml")
    shares = [cfg.sources[0].share for cfg in plan.variants.values()]
    assert shares == [1.0, 1.0, 0.5, 1.0]
    assert {cfg.steps for cfg in plan.variants.values()} == {2}


@pytest.mark.parametrize("share", [1.0, 0.7, 0.5, 0.01])
def test_any_share_may_be_asked_for(files, share):
    pack = Pack(Path(files.pack))
    source = Source(str(files.pack), transcribed=False, share=share)
    clips = [clip.id for clip in clips_of(source, pack)]
    assert len(clips) == max(1, round(share * len(pack.clips)))
    assert len(set(clips)) == len(clips)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("kind = 'stack'", "plan.toml, stack: unknown option kinnd"),
        ("[[dev]]", "unknown option dve"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_told(files, tmp_path, wrong, message):
    text = PLAN.format(**vars(files)).replace('kind = "stack"', "kind = 'stack'")
    broken = {"kind = 'stack'": "kinnd = 'stack'", "[[dev]]": "[[dve]]"}[wrong]
    (tmp_path / "plan.toml").write_text(text.replace(wrong, broken))
    with pytest.raises(ConfigError, match=message):
        ablate.read_plan(tmp_path / "plan.toml")


def test_the_shipped_plan_can_be_read():
    plan = ablate.read_plan(CONFIGS / "ablate.toml")
    assert len(plan.variants) == 9
    assert {cfg.update for cfg in plan.variants.values()} == {"lora", "full", "frozen"}
