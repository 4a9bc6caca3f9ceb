"""bench.passes: passes append what they say, variants take turns, the page of the CPU engine."""

from __future__ import annotations

import numpy as np
import pytest

from bench import company, machine, manifests, passes
from sparqle_stream import testing
from sparqle_stream.config import StreamOptions, VadConfig


class Fake:
    """A variant whose passes take as many milliseconds as rows, and ten in its first turns."""

    def __init__(self, name, log):
        self.name, self.log, self.n = name, log, 0

    def pass_seconds(self, n_streams, n_rows):
        self.log.append(self.name)
        self.n += 1
        is_warm = self.n > passes.WARM_UPS * len(passes.SHAPES) * passes.REPEATS
        return n_streams * n_rows / 1000 if is_warm else 10.0


def test_variants_take_turns_and_warm_ups_do_not_count():
    log = []
    got = passes.measure([Fake("a", log), Fake("b", log)], n_turns=3)
    assert got["a"] == {"1x1": 1.0, "1x4": 4.0, "8x1": 8.0, "8x4": 32.0}
    n = len(passes.SHAPES) * passes.REPEATS
    assert log[: 4 * n] == ["a"] * n + ["b"] * n + ["a"] * n + ["b"] * n


@pytest.mark.parametrize("shape", passes.SHAPES)
def test_a_pass_of_torch_appends_its_rows(tiny, shape):
    n_streams, n_rows = shape
    stages = tiny.make_stages(8)
    rows = np.ones((n_streams, n_rows, tiny.cfg.llm.width), np.float32)
    passes._appender(stages, 20, rows)()
    assert stages.state.llm.length.tolist() == [20 + n_rows] * n_streams + [20] * (8 - n_streams)


@pytest.mark.parametrize("shape", passes.SHAPES)
def test_a_pass_of_onnx_appends_its_rows(tiny, tmp_path, shape):
    from sparqle_stream.onnx_cpu import model
    from sparqle_stream.onnx_cpu.export import export

    export(tiny, tmp_path / "tiny", "float32")
    stages = model.load(tmp_path / "tiny", tiny.tokenizer).make_stages(8)
    n_streams, n_rows = shape
    rows = np.ones((n_streams, n_rows, tiny.cfg.llm.width), np.float32)
    passes._appender(stages, 20, rows)()
    assert stages.slots.length.tolist() == [20 + n_rows] * n_streams + [0] * (8 - n_streams)


def test_the_page_shows_every_variant():
    from bench.report_passes import passes as section
    from bench.tables import Machines

    result = {
        "settings": {"filled": 150},
        "machine": machine.card("weights", 2),
        "read_gb_per_s": {"onnx int8": 12.0, "torch float32": 20.0},
        "bound_ms": {"onnx int8": 3.4, "torch float32": 21.0},
        "pass_ms": {"onnx int8": {"1x1": 5.4}, "torch float32": {"1x1": 30.0}},
        "stage_ms": {"onnx int8": {"encoder": 9.3}, "torch float32": {"encoder": 22.0, "ctc": 0.7}},
        "second_ms": {"1": {"vad": 8.0, "llm": 40.0}, "8": {"vad": 2.0, "llm": 10.0}},
    }
    page = "\n".join(section([("passes.json", result)], Machines()))
    assert "| onnx int8 | 3.4 (12 GB/s) | 5.4 |" in page
    assert "150 rows" in page
    assert "| 8 | 2.0 | 10.0 | 12.0 | 0.25 |" in page


@pytest.mark.parametrize("n_streams", [1, 3])
def test_what_goes_in_step_is_written_and_counted(tiny, n_streams):
    """The tiny model on the bundled clip, twice as long for each: all stages take time."""
    pcm = manifests.bundled().recordings[0].pcm()[:48_000]
    spent, _ = company.stage_ms(tiny, StreamOptions(vad=VadConfig(kind="off")), pcm, n_streams)
    assert {"vad", "features", "encoder", "qformer", "llm", "captions"} <= set(spent)
    assert all(ms > 0 for ms in spent.values())


@pytest.mark.parametrize("n_streams", [1, 2])
def test_streams_in_step_write_what_is_said(n_streams):
    """Nobody flushes: the last chunk's words may be open, for each stream."""
    said = testing.vocabulary(12)
    options = StreamOptions(vad=VadConfig(kind="off"))
    made = testing.oracle_model(), options, testing.say(said), n_streams, testing.OracleBatch
    n_words = company.stage_ms(*made)[1]
    assert n_streams * (len(said) - 4) <= n_words <= n_streams * (len(said) + 1)
