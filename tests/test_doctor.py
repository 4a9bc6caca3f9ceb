"""Doctor: true about this machine, and able to tell each thing that can be wrong with another."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata

import pytest
import torch

from sparqle_stream import artifacts, cli, doctor, models
from sparqle_stream.doctor import Finding
from sparqle_stream.errors import ModelError
from tests.fakes.portaudio import Device, FakeSoundDevice


@pytest.fixture
def has_models(monkeypatch):
    """As if every model file were here and whole."""
    monkeypatch.setattr(artifacts, "verify", lambda name: None)


@pytest.fixture
def webcam(monkeypatch):
    sd = FakeSoundDevice([Device("Webcam"), Device("Headset", channels=2)])
    monkeypatch.setitem(sys.modules, "sounddevice", sd)
    return sd


def about(findings: list[Finding], topic: str) -> list[Finding]:
    return [finding for finding in findings if finding.topic.startswith(topic)]


def examine(compute: str = "cpu") -> list[Finding]:
    return doctor.examine("sparqle-base-en", None, compute)


@pytest.mark.usefixtures("has_models", "webcam")
def test_a_machine_in_order():
    findings = examine()
    assert not [finding for finding in findings if finding.status == "fail"]
    (python,) = about(findings, "python")
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in python.detail
    (found,) = about(findings, "torch")
    assert found.detail.startswith(f"{torch.__version__}, {torch.get_num_threads()} threads on ")
    (mic,) = about(findings, "microphone")
    assert mic == Finding("microphone", "ok", "Webcam (ALSA, 48000 Hz) and 1 more (--list-devices)")
    assert [f.topic for f in about(findings, "model")] == [
        "model sparqle-base-en",
        "model smollm2-135m-instruct",
    ]
    assert doctor.as_table(findings).endswith("captions will work here")


@pytest.mark.usefixtures("has_models", "webcam")
def test_kernels_are_those_that_ran():
    """Seen while a model runs, not asked of the code that chooses: it cannot lie."""
    kernels = {f.topic.removeprefix("kernel "): f.detail for f in about(examine(), "kernel ")}
    assert {"chunk_attention", "query_attention", "decode_attention"} <= set(kernels)
    assert kernels["decode_attention"] == "cpu (written for a CPU)"
    assert kernels["chunk_attention"].startswith("reference (on a CPU ")


@pytest.mark.usefixtures("webcam")
def test_damaged_files_fail_with_what_to_do(monkeypatch):
    def verify(name: str) -> None:
        if name == artifacts.DEFAULT_LLM:
            raise ModelError(f"{name} is damaged: model.safetensors has changed", hint="pull")

    monkeypatch.setattr(artifacts, "verify", verify)
    findings = doctor._model_files("sparqle-base-en", None)
    assert [finding.status for finding in findings] == ["ok", "fail"]
    assert "has changed" in findings[1].detail
    assert findings[1].hint == "pull"


@pytest.mark.usefixtures("has_models")
def test_a_model_of_ones_own_is_not_called_checked(tmp_path):
    for name in artifacts.MODEL_FILES:
        (tmp_path / name).touch()
    statuses = [f.status for f in doctor._model_files(str(tmp_path), str(tmp_path))]
    assert statuses == ["note", "note"]
    own, its_llm = doctor._model_files(str(tmp_path), None)
    assert (own.status, its_llm.topic) == ("note", f"model {artifacts.DEFAULT_LLM}")
    (random,) = doctor._model_files("random:tiny", None)
    assert random.status == "note"


@pytest.mark.usefixtures("has_models")
def test_a_model_that_is_not_there_is_no_note():
    """doctor --model typo said that captions would work."""
    found = {f.topic: f.status for f in doctor._model_files("sparkle", "smol")}
    assert found == {"model sparkle": "fail", "llm smol": "fail"}


def test_a_missing_microphone_is_only_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", FakeSoundDevice([]))
    (finding,) = doctor._audio()
    assert (finding.status, finding.detail) == (
        "note",
        "no microphone: this machine has no input device",
    )


@pytest.mark.parametrize(("compute", "status"), [("cpu", "note"), ("cuda", "fail")])
def test_no_cuda_matters_only_to_who_wants_it(monkeypatch, compute, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = doctor._cuda(is_wanted=compute == "cuda")
    assert finding.status == status


def test_a_package_that_lacks_names_what_does_not_work(monkeypatch):
    version = metadata.version

    def without(name: str) -> str:
        if name in ("websockets", "soxr"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    lacking = {f.detail: f.status for f in doctor._packages() if f.status != "ok"}
    assert lacking == {
        "soxr is not installed": "fail",
        "websockets is not installed, so no serve and client": "note",
    }


def test_a_pipeline_that_breaks_is_a_finding_and_not_a_traceback(monkeypatch):
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: 1 / 0)
    (finding,) = doctor._self_test("cpu")
    assert (finding.topic, finding.status) == ("self-test", "fail")
    assert "ZeroDivisionError" in finding.detail


@pytest.mark.usefixtures("webcam")
@pytest.mark.parametrize(("broken", "status"), [(False, 0), (True, 1)])
def test_the_command_prints_json_and_fails_when_captions_cannot_work(
    monkeypatch, capsys, broken, status
):
    finding = Finding("torch", "fail" if broken else "ok", "so it is", "mend it" * broken)
    monkeypatch.setattr(doctor, "examine", lambda *args: [finding])
    assert cli.main(["doctor", "--json"], {}) == status
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is not broken
    assert found["findings"][0]["detail"] == "so it is"
    assert cli.main(["doctor"], {}) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [finding.status, "torch", "so", "it", "is"]
    assert lines[-1] == ("1 problem to mend" if broken else "captions will work here")


@pytest.mark.usefixtures("has_models", "webcam")
def test_without_torch_everything_else_is_still_told(monkeypatch):
    """It was a traceback: the kernels, which the self-test looks at, cannot be imported either."""
    for name in [n for n in sys.modules if n.partition(".")[0] in ("torch", "sparqle_kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = examine()
    failed = [finding.topic for finding in findings if finding.status == "fail"]
    assert failed == ["torch", "self-test"]
    assert about(findings, "microphone")[0].status == "ok"


def test_an_onnxruntime_that_cannot_be_loaded_is_found(monkeypatch):
    """`captions will work here`, it said: only torch was tried."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    finding = doctor._backend("onnx", "int8")
    assert (finding.status, "onnxruntime cannot be loaded" in finding.detail) == ("fail", True)
    assert doctor._backend("torch", "float32").status == "ok"


@pytest.mark.parametrize(
    ("state", "status"),
    [("none", "note"), ("whole", "ok"), ("damaged", "note"), ("sealed", "fail")],
)
def test_graphs_are_there_or_can_be_made(monkeypatch, tmp_path, state, status):
    folder = tmp_path / "graphs" / "key"
    monkeypatch.setattr(models, "graphs_folder", lambda *_: folder)
    if state in ("whole", "damaged"):
        folder.mkdir(parents=True)
        monkeypatch.setattr(
            "sparqle_stream.onnx_cpu.model.lacking", lambda _: "llm.data" * (state == "damaged")
        )
    if state == "sealed":
        monkeypatch.setattr(os, "access", lambda *_: False)
    (finding,) = doctor._graphs("sparqle-base-en", None, "int8")
    assert finding.status == status


@pytest.mark.parametrize(
    "options", [["--dtype", "bfloat16", "--backend", "onnx"], ["--threads", "-5"]]
)
def test_options_that_captions_would_refuse_are_refused(options, capsys):
    assert cli.main(["doctor", *options], {}) == 2
    assert "error:" in capsys.readouterr().err
