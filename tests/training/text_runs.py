"""What tests of training.prefix share: a small config, and what a run has logged."""

from __future__ import annotations

import json

from training.prefix import PrefixConfig, Text


def small_config(texts, dev, **changes):
    """Of a run of six steps over the file `texts`; the file `dev` is read for its perplexity."""
    small = {"steps": 6, "rows": 4, "row_length": 12, "bf16": False}
    return PrefixConfig(texts=(Text(str(texts)),), dev=(Text(str(dev)),), **small | changes)


def log_of(work):
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
