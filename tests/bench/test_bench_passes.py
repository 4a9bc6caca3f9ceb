"""bench.passes: passes append what they say, variants take turns, the page of the CPU engine."""

from __future__ import annotations

import numpy as np
import pytest

from bench import machine, passes


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
    }
    page = "\n".join(section([("passes.json", result)], Machines()))
    assert "| onnx int8 | 3.4 (12 GB/s) | 5.4 |" in page
    assert "150 rows" in page
