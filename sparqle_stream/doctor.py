"""Doctor: what works on this machine, and what to do about what does not.

Contract: looking changes nothing and fetches nothing; a probe that fails is a finding, not an
error. 'fail' is what keeps captions from working at all; 'note' is what some command lacks.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sparqle_stream import __version__, messages
from sparqle_stream.config import n_cores
from sparqle_stream.errors import ModelError, SparqleError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

MIN_PYTHON = (3, 11)
# Distribution -> what does not work without it.
PACKAGES = {
    "numpy": "",
    "tokenizers": "",
    "safetensors": "",
    "gguf": "",
    "soxr": "",
    "av": "",
    "onnx": "",
    "onnxruntime": "",
    "silero-vad": "",
    "webrtcvad-wheels": "--vad webrtc",
    "rich": "the live view",
    "sounddevice": "--mic",
    "starlette": "serve",
    "uvicorn": "serve",
    "websockets": "serve and client",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: `status` is ok, note or fail; `hint` says what to do unless it is ok."""

    topic: str
    status: str
    detail: str
    hint: str = ""


def examine(
    model: str, llm: str | None, compute: str, backend: str = "auto", dtype: str = "auto"
) -> list[Finding]:
    """All findings, in the order in which a person wants them. Raises ConfigError for options that
    do not go together."""
    from sparqle_stream import models

    is_random = model == models.RANDOM_TINY
    backend, dtype = models.choose(backend, dtype, compute, is_random=is_random)
    return [
        *_python(),
        *_packages(),
        *_torch(),
        *_cuda(is_wanted=compute == "cuda"),
        _backend(backend, dtype),
        *_audio(),
        *_model_files(model, llm),
        *(_graphs(model, llm, dtype) if backend == "onnx" else ()),
        *_self_test(compute),
    ]


def as_table(findings: list[Finding]) -> str:
    """One line a finding, its hint below it, and a summary."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<4}  {finding.topic:<{width}}  {finding.detail}")
        if finding.hint:
            lines.append(f"{'':<{width + 8}}-> {finding.hint}")
    n_failed = sum(finding.status == "fail" for finding in findings)
    problems = "1 problem" if n_failed == 1 else f"{n_failed} problems"
    lines += ["", f"{problems} to mend" if n_failed else "captions will work here"]
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> str:
    """The findings for machines, and whether captions will work."""
    is_ok = all(finding.status != "fail" for finding in findings)
    return json.dumps({"ok": is_ok, "findings": [asdict(f) for f in findings]}, indent=2)


def _python() -> list[Finding]:
    version = platform.python_version()
    where = f"sparqle-stream {__version__}, Python {version}, {platform.platform(terse=True)}"
    if sys.version_info < MIN_PYTHON:
        return [Finding("python", "fail", where, f"use Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]}")]
    return [Finding("python", "ok", where)]


def _packages() -> list[Finding]:
    there, findings = [], []
    for name, purpose in PACKAGES.items():
        try:
            there.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            status, lacks = ("note", f", so no {purpose}") if purpose else ("fail", "")
            detail = f"{name} is not installed{lacks}"
            findings.append(Finding("packages", status, detail, f"pip install {name}"))
    return [Finding("packages", "ok", ", ".join(there)), *findings]


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as err:
        return [Finding("torch", "fail", f"cannot be imported: {err}", "pip install torch")]
    detail = (
        f"{torch.__version__}, {torch.get_num_threads()} threads on {n_cores()} cores,"
        f" {torch.backends.cpu.get_cpu_capability()}"
    )
    return [Finding("torch", "ok", detail)]


def _cuda(*, is_wanted: bool) -> list[Finding]:
    """CUDA devices and Triton; without a GPU both are only worth a note."""
    try:
        import torch
    except (ImportError, OSError):
        return []
    missing = "fail" if is_wanted else "note"
    if not torch.cuda.is_available():
        why = (
            "this torch is built without CUDA" if torch.version.cuda is None else "no device found"
        )
        return [Finding("cuda", missing, f"{why}; the CPU is used", "--compute cpu needs none")]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    findings = [Finding("cuda", "ok", f"CUDA {torch.version.cuda}: {', '.join(names)}")]
    try:
        findings.append(Finding("triton", "ok", metadata.version("triton")))
    except metadata.PackageNotFoundError:
        hint = "pip install 'sparqle-stream[gpu]'"
        findings.append(Finding("triton", "note", "not installed: slower on CUDA", hint))
    return findings


def _backend(backend: str, dtype: str) -> Finding:
    """What computes captions, as the options say."""
    if backend == "onnx":
        try:
            import onnxruntime  # noqa: F401
        except Exception as err:  # noqa: BLE001 - a library of the system that is missing, or too old
            detail = f"onnxruntime cannot be loaded: {type(err).__name__}: {err}"
            hint = "pip install --force-reinstall onnxruntime, or use --backend torch"
            return Finding("backend", "fail", detail, hint)
    what = {
        "onnx": "ONNX Runtime: graphs made from the weights once, without torch afterwards",
        "torch": "torch, with the kernels below",
    }
    return Finding("backend", "ok", f"{backend} with the LLM in {dtype} ({what[backend]})")


def _audio() -> list[Finding]:
    from sparqle_stream import microphone

    try:
        devices = microphone.input_devices()
        chosen = microphone.choose(None, devices)
    except SparqleError as err:
        return [Finding("microphone", "note", err.message, err.hint)]
    others = f" and {len(devices) - 1} more (--list-devices)" if len(devices) > 1 else ""
    detail = f"{chosen.name} ({chosen.host_api}, {chosen.rate_hz} Hz){others}"
    return [Finding("microphone", "ok", detail)]


def _model_files(model: str, llm: str | None) -> list[Finding]:
    """Every file of the model and of its LLM, by hash where one is pinned."""
    from sparqle_stream import artifacts, models
    from sparqle_stream.onnx_cpu.settings import INDEX

    if model == models.RANDOM_TINY:
        return [Finding(f"model {model}", "note", "random weights, for sizing and tests")]
    if (Path(model) / INDEX).is_file():
        return [Finding(f"model {model}", "note", "graphs of your own, LLM included: unchecked")]
    llm = llm or artifacts.BUNDLED.get(model, artifacts.DEFAULT_LLM)
    findings = []
    if model not in artifacts.BUNDLED:
        findings.append(_unpinned(f"model {model}", lambda: artifacts.model_folder(model)))
    if llm not in artifacts.LLM_WHEELS:
        findings.append(_unpinned(f"llm {llm}", lambda: artifacts.llm_source(llm)))
    for info in artifacts.list_models():
        if info.name not in (model, llm):
            continue
        try:
            artifacts.verify(info.name)
        except SparqleError as err:
            findings.append(Finding(f"model {info.name}", "fail", err.message, err.hint))
        else:
            detail = f"{info.where}, {info.n_bytes / 1e6:.1f} MB, hashes as pinned"
            findings.append(Finding(f"model {info.name}", "ok", detail))
    return findings


def _graphs(model: str, llm: str | None, dtype: str) -> list[Finding]:
    """Whether what is made from the weights at the first start is there, or can be made."""
    from sparqle_stream import models
    from sparqle_stream.onnx_cpu.model import lacking

    try:
        folder = models.graphs_folder(model, llm, dtype)
    except SparqleError:
        return []  # a folder of graphs, or a model that was found missing above
    if not (name := lacking(folder)):
        return [Finding("graphs", "ok", f"{folder}")]
    place = next(p for p in folder.parents if p.exists())
    if not os.access(place, os.W_OK):
        hint = "point SPARQLE_HOME at a folder of yours, or use --backend torch"
        return [Finding("graphs", "fail", f"not made yet, and {place} cannot be written", hint)]
    if folder.exists():
        return [
            Finding("graphs", "note", f"{folder} has no {name}: the next start makes them anew")
        ]
    return [Finding("graphs", "note", f"the first start makes them, in {folder.parent}")]


def _unpinned(topic: str, find: Callable[[], object]) -> Finding:
    """A model or LLM of the user's own: whether it is there is all that can be said."""
    try:
        find()
    except SparqleError as err:
        return Finding(topic, "fail", err.message, err.hint)
    return Finding(topic, "note", "not one with pinned hashes: unchecked")


def _self_test(compute: str) -> list[Finding]:
    """Runs a random model over a second of noise, and sees which kernels that called."""
    try:
        from sparqle_kernels import choice

        seconds, used = _run_tiny(compute)
    except SparqleError as err:
        return [Finding("self-test", "fail", err.message, err.hint)]
    except Exception as err:  # noqa: BLE001 - whatever breaks here would break captions
        hint = "sparqle-stream --debug --model random:tiny FILE shows the whole story"
        return [Finding("self-test", "fail", f"{type(err).__name__}: {err}", hint)]
    detail = f"1 s of sound through a random model in {seconds:.2f} s"
    findings = [Finding("self-test", "ok", detail)]
    for kernel, implementations in sorted(used.items()):
        chosen = " and ".join(sorted(implementations))
        expected = choice.on_device(kernel, compute)
        others = "" if chosen == expected.implementation else f"not {expected.implementation}: "
        findings.append(Finding(f"kernel {kernel}", "ok", f"{chosen} ({others}{expected.reason})"))
    return findings


def _run_tiny(compute: str) -> tuple[float, dict[str, set[str]]]:
    """Seconds that a second of sound took; kernel -> its implementations that were called."""
    import numpy as np

    from sparqle_stream import models
    from sparqle_stream.config import SAMPLE_RATE_HZ, EngineConfig, StreamOptions, VadConfig
    from sparqle_stream.engine import Engine

    used: dict[str, set[str]] = {}

    def watch(frame: FrameType, event: str, _arg: object) -> None:
        match str(frame.f_globals.get("__name__")).split("."):
            case ["sparqle_kernels", kernel, implementation] if event == "call":
                used.setdefault(kernel, set()).add(implementation)

    model = models.load("random:tiny", device=compute)
    noise = 0.1 * np.random.default_rng(0).standard_normal(SAMPLE_RATE_HZ).astype(np.float32)
    threading.setprofile(watch)  # the engine's worker starts after this
    try:
        started = time.perf_counter()
        with Engine(model, EngineConfig(n_slots=1, compute=compute)) as engine:
            events = engine.transcribe(noise, StreamOptions(vad=VadConfig(kind="off")))
        seconds = time.perf_counter() - started
    finally:
        threading.setprofile(None)
    if isinstance(events[-1], messages.Error):
        raise ModelError(events[-1].message, hint=events[-1].hint)
    return seconds, used
