"""sources.py: which clips are used, why others are not, and workers that outlive a Ctrl-C."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from sparqle_stream.errors import ConfigError
from training.adapt import AdaptConfig
from training.corpus import PackWriter
from training.data import AugmentConfig
from training.sources import Source, make_feed, make_sampler

PLAIN = AugmentConfig(speed=0.0, room=0.0, telephone=0.0)


def write_pack(folder, clips):
    """(text, seconds) each."""
    with PackWriter(folder) as writer:
        for i, (text, seconds) in enumerate(clips):
            pcm = np.ones(round(16_000 * seconds), np.int16)
            writer.add(pcm, id=str(i), text=text, speaker="", corpus="", licence="")
    return Source(str(folder))


def draw(source, stream_s=2.0, lengths_s=()):
    return make_sampler((source,), "", PLAIN, stream_s, 0, 0.0, lengths_s)


def test_each_source_says_what_is_not_used_and_why(tmp_path, caplog):
    bad = [("In 1984.", 1), ("The café.", 1), ("", 1), ("long", 20), ("too long", 5), ("hm", 0.05)]
    source = write_pack(tmp_path, [("so", 1), ("it is", 1), *bad])
    for _ in range(2):  # a run has several feeds
        draw(source)
    (told,) = caplog.messages
    assert told.startswith(f"{tmp_path}: 2 of 8 clips are used; left out: 2 with digits, ")
    for reason in ("1 without a text", "1 of 20 s or more", "1 too long for a stream of 2.0 s"):
        assert reason in told
    assert "1 shorter than 0.1 s" in told


def test_all_lengths_count(tmp_path, caplog):
    source = write_pack(tmp_path, [("so", 1), ("it is", 5)])
    caplog.set_level(logging.INFO)
    draw(source, 2.0, (2.0, 6.0))
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "2 of 2 clips are used" in caplog.text


@pytest.mark.parametrize(
    ("clips", "why", "hint"),
    [
        ([("In 1984.", 1)], "1 with digits", "spell numbers out, or say transcribed = false"),
        ([("", 1)], "1 without a text", "transcribed = false"),
        ([("so", 3)], "1 too long for a stream", "raise stream_s"),
    ],
)
def test_a_source_without_usable_clips_names_the_reason(tmp_path, clips, why, hint):
    source = write_pack(tmp_path, clips)
    with pytest.raises(ConfigError, match=why) as told:
        draw(source)
    assert hint in told.value.hint
    if "transcribed" in hint:
        draw(replace(source, transcribed=False))


def test_workers_go_on_after_ctrl_c(tmp_path):
    """The terminal tells all processes; the main one ends its step, for which it needs batches."""
    source = write_pack(tmp_path, [("so", 1)])
    cfg = AdaptConfig("", (source,), streams=1, stream_s=1.28, workers=1, augment=PLAIN)
    before = set(multiprocessing.active_children())
    batches = make_feed(cfg, 0).batches
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    assert os.getpgid(worker.pid) != os.getpgid(0)  # nor does a SIGTERM for the group reach it
    os.kill(worker.pid, signal.SIGINT)
    for _ in range(9):  # more than it had made ahead of time
        next(batches)
    assert worker.is_alive()
