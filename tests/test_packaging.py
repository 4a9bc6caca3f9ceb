"""What a user installs: the wheel in a clean environment, the pins, the version."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if TYPE_CHECKING:
    from collections.abc import Iterable

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
MAX_WHEEL_BYTES = 100_000_000  # what a package index takes without asking
# Gigabytes of CUDA come with any of these; `make` must never install one.
NEVER_INSTALLED = re.compile(r"nvidia-|cuda-|torchaudio|torchvision|triton|onnxruntime-gpu")


def pins() -> dict[str, str]:
    """constraints.txt: name -> exact version."""
    lines = (REPO / "constraints.txt").read_text().splitlines()
    parts = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in parts}


def requirements(lines: Iterable[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines]


def shipped_files() -> dict[str, Path]:
    """Everything under the two packages, by its name in the wheel.

    A file that git ignores (caches) is not shipped; one that is not added yet is.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z", "sparqle_stream", "kernels"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs into the wheel is not known")
    names = [name for name in listed.stdout.split("\0") if name and (REPO / name).is_file()]
    inside = {name.removeprefix("kernels/"): REPO / name for name in names}
    packages = ("sparqle_stream/", "sparqle_kernels/")
    return {name: path for name, path in inside.items() if name.startswith(packages)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built by the backend of this environment: no network, no isolation."""
    out = tmp_path_factory.mktemp("dist")
    run = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` folder of a new environment that holds the wheel and nothing of the checkout.

    The dependencies are those of this environment, lent by a .pth line. Python reads no .pth
    files in a folder that came in by one, so the editable install here does not leak through.
    """
    home = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-index", "--no-deps", str(wheel)], check=True)
    (site_packages,) = home.glob("lib/python*/site-packages")
    (site_packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run_clean(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.slow
def test_the_wheel_holds_both_packages_whole(wheel):
    inside = zipfile.ZipFile(wheel)
    sizes = {info.filename: info.file_size for info in inside.infolist()}
    expected = {name: path.stat().st_size for name, path in shipped_files().items()}
    meta = {name for name in sizes if ".dist-info/" in name}
    assert {name: size for name, size in sizes.items() if name not in meta} == expected
    assert any(name.startswith("sparqle_kernels/") for name in expected)
    assert any(name.endswith("/LICENSE") for name in meta)


@pytest.mark.slow
def test_the_wheel_carries_the_trained_weights_and_the_clip(wheel):
    from sparqle_stream import artifacts

    names = zipfile.ZipFile(wheel).namelist()
    assets = "sparqle_stream/assets/"
    for part in (*artifacts.MODEL_FILES, "words.safetensors", "README.md"):
        assert f"{assets}sparqle-base-en/{part}" in names
    assert [name for name in names if name.startswith(f"{assets}demo.")]
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES


@pytest.mark.slow
def test_the_installed_command_answers(installed, tmp_path):
    run = run_clean([str(installed / "sparqle-stream"), "--help"], tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    for word in ("transcribe", "serve", "client", "doctor", "models", "--mic"):
        assert word in run.stdout


@pytest.mark.slow
def test_the_installed_packages_are_those_of_the_wheel(installed, tmp_path):
    """Without the checkout on the path: the engine, the kernels and the assets are found."""
    code = (
        "import importlib.metadata, importlib.resources, sys\n"
        "import sparqle_stream.engine, sparqle_stream.server, sparqle_kernels\n"
        "for package in (sparqle_stream, sparqle_kernels):\n"
        "    where = list(package.__path__)[0]\n"
        "    assert where.startswith(sys.prefix), where\n"
        "assets = importlib.resources.files('sparqle_stream') / 'assets'\n"
        "assert (assets / 'sparqle-base-en' / 'config.json').is_file()\n"
        "print(sparqle_stream.__version__, importlib.metadata.version('sparqle-stream'))\n"
    )
    run = run_clean([str(installed / "python"), "-c", code], tmp_path)
    assert run.returncode == 0, run.stderr
    newest = changelog_versions()[0]
    assert run.stdout.split() == [newest, newest]


def changelog_versions() -> list[str]:
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (REPO / "CHANGELOG.md").read_text(), re.M)


def test_the_version_is_the_newest_of_the_changelog():
    import sparqle_stream

    versions = changelog_versions()
    assert versions[0] == sparqle_stream.__version__
    assert versions == sorted(versions, key=Version, reverse=True)


def test_every_requirement_that_make_installs_is_pinned_and_allowed():
    """A requirement without a pin would take whatever the index has on the day of the demo."""
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    pinned = pins()
    for requirement in requirements(wanted):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in constraints.txt; run: make lock"
        assert requirement.specifier.contains(version), f"{requirement} but pinned {version}"


def test_the_pins_are_exact_and_bring_no_cuda():
    for name, version in pins().items():
        assert str(Version(version)) == version, f"{name}=={version}"
        assert Version(version).local is None, "a local version exists on one index only"
        assert not NEVER_INSTALLED.match(name), name
    assert pins()["torch"].startswith("2.")


def test_the_plain_install_needs_no_extra_and_no_cuda():
    names = [canonicalize_name(r.name) for r in requirements(PROJECT["dependencies"])]
    assert not [name for name in names if NEVER_INSTALLED.match(name)]
    assert set(PROJECT["optional-dependencies"]) == {
        "gpu",
        "train",
        "peers",
        "plot",
        "ray",
        "dev",
    }


def test_make_alone_explains_itself():
    """Every target that is offered says what it does, and the two commands are among them."""
    run = subprocess.run(["make", "-s"], cwd=REPO, capture_output=True, text=True, check=True)
    offered = re.findall(r"^  make (\w+) +\S", run.stdout, re.M)
    assert {"demo", "test", "install", "fmt", "check", "bench", "build", "clean"} <= set(offered)
