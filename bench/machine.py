"""The machine card: what a figure was measured on, and whether the machine was free for it.

Out: plain dicts for JSON. Contract: nothing that identifies a person or a host is in a card.
Timing on a busy machine says little: `require_free` refuses it, and `Watch` tells how much of the
cores other processes took while a benchmark ran.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparqle_stream.config import n_cores
from sparqle_stream.errors import ConfigError, MissingExtraError

REPO = Path(__file__).resolve().parent.parent
# What the speed of a step depends on, beside the clock.
VECTOR_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
# What a figure may change with.
PACKAGES = (
    *("sparqle-stream", "torch", "transformers", "tokenizers", "numpy", "onnxruntime"),
    *("silero-vad", "webrtcvad-wheels", "av", "soxr", "jiwer", "whisper-normalizer"),
)
MAX_BUSY_SHARE = 0.1  # of all cores, by other processes, before timing starts
PROBE_S = 1.0


def card(weights_hash: str, n_threads: int) -> dict[str, Any]:
    """Everything about this machine and this code that a figure may depend on."""
    return {
        "cpu": cpu_model(),
        "cpu_flags": [flag for flag in VECTOR_FLAGS if flag in _cpu_flags()],
        "cores": os.cpu_count(),
        "cores_allowed": n_cores(),
        "threads": n_threads or n_cores(),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "commit": commit(),
        "weights_hash": weights_hash,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
    }


def cpu_model() -> str:
    """The name that the processor gives itself."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of the packages that figures may change with."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(repo: Path = REPO) -> str:
    """The commit of the code, with '+changes' when tracked files differ; '' outside git."""
    head = _git(repo, "rev-parse", "--short=12", "HEAD")
    changes = _git(repo, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if head and changes else head


def peak_rss_mb() -> float:
    """Most memory that this process has held at once, in 10^6 bytes.

    Where /proc tells it: getrusage also counts what the parent held when it started this process.
    """
    if (told := high_water_mb()) is not None:
        return round(told, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def high_water_mb(pid: int | str = "self") -> float | None:
    """Most memory that a process has held, in 10^6 bytes; None if it is gone, or without /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    marks = (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return next((1024 * mark / 1e6 for mark in marks), None)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one process has and has used at one moment."""

    cpu_s: float  # of all its threads since it began
    rss_mb: float
    open_files: int
    threads: int


class Process:
    """Another process by its id, or this one."""

    def __init__(self, pid: int | None = None) -> None:
        psutil = _psutil()
        try:
            self._process = psutil.Process(pid)
        except psutil.NoSuchProcess as err:
            raise ConfigError(f"there is no process {pid}", hint="ps shows their ids") from err

    def read(self) -> Reading:
        """Raises ConfigError for a process of somebody else."""
        try:
            with self._process.oneshot():
                times = self._process.cpu_times()
                return Reading(
                    cpu_s=times.user + times.system,
                    rss_mb=self._process.memory_info().rss / 1e6,
                    open_files=self._process.num_fds(),
                    threads=self._process.num_threads(),
                )
        except _psutil().Error as err:
            raise ConfigError(
                f"process {self._process.pid} cannot be read: {err}",
                hint="is it running, and yours?",
            ) from err


class Conditions:
    """What a run is done under, from now on; `busy_before` as `require_free` gave it.

    server: a process that belongs to what is measured.
    """

    def __init__(self, busy_before: float, server: Process | None = None) -> None:
        self._busy_before, self._load = busy_before, os.getloadavg()
        self._watch, self._start = Watch(server), time.perf_counter()

    def summary(self) -> dict[str, Any]:
        during = self._watch.others()
        return {
            "wall_seconds": round(time.perf_counter() - self._start, 1),
            "peak_rss_mb": peak_rss_mb(),
            "load_average_before": [round(load, 2) for load in self._load],
            "others_share_before": round(self._busy_before, 3),
            "others_share_during": round(during, 3),
            "machine_was_busy": max(self._busy_before, during) > MAX_BUSY_SHARE,
        }


class Watch:
    """How much of the machine other processes use, from now on.

    `others` is a share of all cores: 0.5 on two cores means that one of them is taken. Ours are
    this process, its children that have ended, and `server`.
    """

    def __init__(self, server: Process | None = None) -> None:
        self._psutil, self._server = _psutil(), server
        self._start = self._spent()

    def others(self) -> float:
        all_s, busy_s, own_s = (
            now - then for now, then in zip(self._spent(), self._start, strict=True)
        )
        return min(1.0, max(0.0, (busy_s - own_s) / all_s)) if all_s > 0 else 0.0

    def _spent(self) -> tuple[float, float, float]:
        """Core seconds since boot: all, not idle, ours."""
        times = self._psutil.cpu_times()._asdict()
        # Guests are counted in user and nice already.
        total = sum(s for name, s in times.items() if not name.startswith("guest"))
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = time.process_time() + children.ru_utime + children.ru_stime
        if self._server is not None:
            own += self._server.read().cpu_s
        return total, total - times["idle"] - times.get("iowait", 0.0), own


def busy_share(seconds: float = PROBE_S) -> float:
    """Share of all cores that other processes take, measured over `seconds`."""
    watch = Watch()
    time.sleep(seconds)
    return watch.others()


def require_free(*, is_forced: bool) -> float:
    """The share of the cores that others take; raises ConfigError when it is too large."""
    share = busy_share()
    if share > MAX_BUSY_SHARE and not is_forced:
        raise ConfigError(
            f"other programs take {share:.0%} of this machine: timing would say little",
            hint="stop them, or use --force: the result then says that the machine was busy",
        )
    return share


def _psutil() -> Any:  # noqa: ANN401 - a module
    try:
        import psutil
    except ImportError as err:
        raise MissingExtraError("psutil is not installed", hint="pip install -e .[dev]") from err
    return psutil


def _cpuinfo(key: str) -> str:
    """The first value of a key in /proc/cpuinfo; '' where there is none."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _git(repo: Path, *args: str) -> str:
    try:
        run = subprocess.run(
            ["git", "-C", str(repo), *args], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip()
