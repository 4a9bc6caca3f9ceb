"""A program that reads sound from a pipe ends cleanly although the pipe is open and silent."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import time
from sparqle_stream import audio, transcribe
source = transcribe.open_source("-", audio.AudioFormat("s16le", 16_000))
while source.read(0.1) is None:
    pass
print("heard", flush=True)
time.sleep(0.3)  # the thread waits for more
"""


def test_python_ends_while_a_thread_waits_for_the_pipe():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(bytes(3_200))
    process.stdin.flush()
    try:
        assert process.wait(60) == 0, process.stderr.read()
        assert process.stdout.read() == b"heard\n"
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()
