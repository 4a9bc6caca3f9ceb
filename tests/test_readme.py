"""The README is run: every shell and Python block that is not marked `no-run` with its reason."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """Blocks of a language whose fence does not say no-run."""
    found = BLOCK.findall((ROOT / "README.md").read_text())
    return [code for name, info, code in found if name == language and "no-run" not in info]


def run(command: list[str]) -> str:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_unrun_block_gives_its_reason():
    for _, info, code in BLOCK.findall((ROOT / "README.md").read_text()):
        assert "no-run" not in info or len(info.split("no-run:", 1)[-1].strip()) > 5, code


@pytest.mark.slow
@pytest.mark.usefixtures("llm_pulled")
@pytest.mark.parametrize("code", blocks("sh"), ids=lambda code: code.split("\n")[0][:40])
def test_shell_blocks_run(code):
    assert run(["bash", "-euo", "pipefail", "-c", code]).strip()


@pytest.mark.slow
@pytest.mark.usefixtures("llm_pulled")
@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0][:40])
def test_python_blocks_run(code):
    assert run([sys.executable, "-c", code]).strip()
