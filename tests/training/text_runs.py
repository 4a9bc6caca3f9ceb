"""What tests of training.prefix share: a small config, and what a run has logged."""

from __future__ import annotations

import json

from training.prefix import PrefixConfig, Text, Trainer


def small_config(texts, dev, **changes):
    """Of a run of six steps over the file `texts`; the file `dev` is read for its perplexity."""
    small = {"steps": 6, "rows": 4, "row_length": 12, "bf16": False}
    return PrefixConfig(texts=(Text(str(texts)),), dev=(Text(str(dev)),), **small | changes)


def whole_and_in_parts(cfg, tmp_path, step):
    """Trainers of a run without a break (in `whole`) and of one that was stopped during `step` and
    went on (in `parts`)."""
    whole, first, again = Trainer(cfg), Trainer(cfg), Trainer(cfg)
    whole.run(tmp_path / "whole", resume=False)
    train_step = first.train_step

    def interrupted():
        first.is_stopped = first.step == step
        return train_step()

    first.train_step = interrupted
    first.run(tmp_path / "parts", resume=False)
    assert first.step == step + 1
    again.run(tmp_path / "parts", resume=True)
    return whole, again


def log_of(work):
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
