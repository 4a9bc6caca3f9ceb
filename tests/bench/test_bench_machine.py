"""The machine card: complete, anonymous, and honest about who else uses the cores."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from bench import machine
from sparqle_stream.errors import ConfigError, MissingExtraError


def test_a_card_has_what_a_figure_depends_on():
    card = machine.card("abc123", n_threads=0)
    assert card["weights_hash"] == "abc123"
    assert card["cores_allowed"] <= card["cores"]
    assert card["threads"] == card["cores_allowed"]
    assert machine.card("", n_threads=3)["threads"] == 3
    assert card["versions"]["torch"].startswith("2.")
    assert len(card["load_average"]) == 3
    assert card["memory_gb"] > 0
    assert card["cpu"]


def test_a_card_names_no_host_and_no_person():
    text = json.dumps(machine.card("abc123", n_threads=1))
    for name in (platform.node(), getpass.getuser()):
        assert f'"{name}"' not in text
        assert len(name) < 5 or name not in text


@pytest.fixture
def repo(tmp_path):
    for args in (
        ["init", "-q"],
        ["config", "user.email", "a@example.com"],
        ["config", "user.name", "A"],
        ["config", "core.hooksPath", str(tmp_path / "none")],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *args], check=True)
    (tmp_path / "a.txt").write_text("one")
    subprocess.run(["git", "-C", str(tmp_path), "add", "a.txt"], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "commit", "-qm", "first"], check=True)
    return tmp_path


def test_the_commit_says_when_the_code_is_not_what_was_committed(repo):
    clean = machine.commit(repo)
    assert len(clean) == 12
    int(clean, 16)
    (repo / "new.txt").write_text("untracked files are no part of the code")
    assert machine.commit(repo) == clean
    (repo / "a.txt").write_text("two")
    assert machine.commit(repo) == f"{clean}+changes"


def test_outside_git_there_is_no_commit(tmp_path):
    assert machine.commit(tmp_path) == ""


class FakeCpu:
    """Core seconds that a test sets. What guests take is in `user` already, as on Linux."""

    def __init__(self, monkeypatch) -> None:
        self.user, self.idle, self.own, self.guest = 100.0, 100.0, 10.0, 50.0
        self.children = 3.0
        psutil = SimpleNamespace(cpu_times=lambda: SimpleNamespace(_asdict=self.times))
        monkeypatch.setattr(machine, "_psutil", lambda: psutil)
        monkeypatch.setattr(machine.time, "process_time", lambda: self.own)
        ended = lambda who: SimpleNamespace(ru_utime=self.children, ru_stime=0.0)  # noqa: E731
        monkeypatch.setattr(machine.resource, "getrusage", ended)

    def times(self) -> dict[str, float]:
        return {"user": self.user, "idle": self.idle, "iowait": 0.0, "guest": self.guest}


def test_others_are_what_is_busy_and_not_ours(monkeypatch):
    """Of 20 core seconds 12 were busy, 7 of them ours: others had 5, a quarter."""
    cpu = FakeCpu(monkeypatch)
    watch = machine.Watch()
    cpu.user, cpu.idle, cpu.own, cpu.guest = 112.0, 108.0, 17.0, 55.0
    assert watch.others() == pytest.approx(0.25)


def test_what_was_measured_in_other_processes_is_ours(monkeypatch):
    """Of 20 core seconds 12 were busy: 2 ours, 4 of a child that has ended, 3 of a server."""
    cpu = FakeCpu(monkeypatch)
    server = SimpleNamespace(read=lambda: SimpleNamespace(cpu_s=cpu.server))
    cpu.server = 7.0
    watch, without = machine.Watch(server), machine.Watch()
    cpu.user, cpu.idle, cpu.own, cpu.children, cpu.server = 112.0, 108.0, 12.0, 7.0, 10.0
    assert watch.others() == pytest.approx(3 / 20)
    assert without.others() == pytest.approx(6 / 20)


def test_a_child_that_has_ended_is_ours():
    """Measured for real."""
    watch = machine.Watch()
    before = watch._spent()[2]
    burn = "import time; t = time.process_time()\nwhile time.process_time() < t + 0.3: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert watch._spent()[2] - before >= 0.3


@pytest.mark.parametrize(
    ("before", "during", "was_busy"), [(0.0, 0.05, False), (0.5, 0.0, True), (0.0, 0.5, True)]
)
def test_a_machine_that_got_busy_was_busy(monkeypatch, before, during, was_busy):
    monkeypatch.setattr(machine.Watch, "others", lambda self: during)
    summary = machine.Conditions(before).summary()
    assert summary["machine_was_busy"] is was_busy
    assert (summary["others_share_before"], summary["others_share_during"]) == (before, during)
    assert len(summary["load_average_before"]) == 3


def test_an_idle_machine_is_free_and_ours_alone(monkeypatch):
    cpu = FakeCpu(monkeypatch)
    watch = machine.Watch()
    assert watch.others() == 0.0  # no time has passed
    cpu.user, cpu.idle, cpu.own = 110.0, 110.0, 20.05  # clocks do not tick together
    assert watch.others() == 0.0


def test_our_own_work_is_not_taken_for_others():
    """Measured for real: a busy loop of this process is ours, whatever else runs."""
    watch = machine.Watch()
    start, own = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < 0.5:
        pass
    own = time.process_time() - own
    assert (
        watch.others() <= 1.0 - own / (time.perf_counter() - start) / machine.os.cpu_count() + 0.1
    )


@pytest.mark.parametrize(
    ("share", "is_forced", "is_refused"),
    [(0.5, False, True), (0.5, True, False), (0.05, False, False)],
)
def test_a_busy_machine_is_refused_unless_forced(monkeypatch, share, is_forced, is_refused):
    monkeypatch.setattr(machine, "busy_share", lambda: share)
    if is_refused:
        with pytest.raises(ConfigError, match="50%") as refused:
            machine.require_free(is_forced=is_forced)
        assert "--force" in refused.value.hint
    else:
        assert machine.require_free(is_forced=is_forced) == share


def test_without_psutil_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(MissingExtraError, match="psutil"):
        machine.Watch()


def test_peak_memory_only_grows():
    before = machine.peak_rss_mb()
    block = bytearray(80_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert machine.peak_rss_mb() >= before
    assert 10 < machine.peak_rss_mb() < 1e6
