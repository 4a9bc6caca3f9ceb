"""docs/structure.md is true to the code: what it names exists, what it counts is so."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import reduce
from pathlib import Path

import pytest

from sparqle_stream import config, messages, session

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "sparqle_stream"
PAGE = (REPO / "docs" / "structure.md").read_text()
NAMES = sorted(set(re.findall(r"`([^`\n]+)`", PAGE)))
FILES = [name for name in NAMES if re.fullmatch(r"[\w/]+\.py|[\w/<>]+/", name)]
CODE = [
    name
    for name in NAMES
    if re.fullmatch(r"[A-Za-z_]+(\.[A-Za-z_]+)?", name) and not name.endswith(".py")
]
# Words of the text that are no names of one place.
ARGUMENTS = {"active", "delay_ms", "sparqle_kernels"}


@pytest.mark.parametrize("name", FILES)
def test_files_that_it_names_are_there(name):
    place = re.sub(r"<\w+>/$", "", name)
    assert (PACKAGE / place).exists() or (REPO / place).exists()


def modules() -> list:
    names = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
    return [importlib.import_module(f"sparqle_stream.{name}") for name in names]


@pytest.mark.parametrize("name", [name for name in CODE if name not in ARGUMENTS])
def test_names_of_code_are_there(name):
    """`module.function`, `Class.method` or the name of something at the top of a module."""
    parts = name.split(".")
    places = {module.__name__.rpartition(".")[2]: module for module in modules()}
    if parts[0] in places:
        reduce(getattr, parts[1:], places[parts[0]])
        return
    homes = [module for module in places.values() if hasattr(module, parts[0])]
    assert homes, f"no module has {parts[0]}"
    reduce(getattr, parts, homes[0])


def test_every_module_of_the_package_is_named():
    here = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert here - set(FILES) == set()


def test_its_numbers_are_those_of_the_code():
    options = config.StreamOptions()
    assert "A chunk is 320 ms" in PAGE
    assert options.chunk_ms == 320
    assert (options.chunk_samples, options.chunk_frames, options.chunk_queries) == (5120, 16, 4)
    assert config.FRAME_LAG_SAMPLES == 40 * 16
    assert config.EncoderConfig().left_frames == 256
    assert config.QFormerConfig().frame_ring * 20 == 1280
    assert {messages.Final, messages.Tail, messages.SpeechStopped, messages.Done} < set(
        messages.Event.__args__
    )
    assert session.FLUSH_SAMPLES > config.FRAME_LAG_SAMPLES


def test_the_order_of_the_stages_is_that_of_the_pipeline():
    from sparqle_stream import pipeline

    source = inspect.getsource(pipeline.listen) + inspect.getsource(pipeline.step)
    calls = re.findall(
        r"\b(features\.step|encoder\.step|model\.ctc|qformer\.step|hear\(|llm\.step)", source
    )
    assert calls == [
        "features.step",
        "encoder.step",
        "model.ctc",
        "qformer.step",
        "hear(",
        "llm.step",
    ]
    told = ["`features.step`", "`encoder.step`", "`CtcHead`", "`qformer.step`", "`Session.hear`"]
    places = [PAGE.index(name) for name in [*told, "`llm.step`"]]
    assert places == sorted(places)
