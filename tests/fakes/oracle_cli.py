"""`sparqle-stream` with a perfect model of a made-up language, and a microphone that speaks it.

    python -m tests.fakes.oracle_cli WORDS... -- ARGUMENTS...

Everything between the command line and the engine's batch is real; what will be captioned is known.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from unittest import mock

from sparqle_stream import cli, engine, models, testing
from tests.fakes.portaudio import Device, FakeSoundDevice


@contextmanager
def oracle():
    """The engine writes what `testing.say` spelled. Use it with `--vad off`."""
    perfect = partial(engine.Engine, make_slots=testing.OracleBatch)
    with (
        mock.patch.object(engine, "Engine", perfect),
        mock.patch.object(models, "load", side_effect=lambda *_, **__: testing.oracle_model()),
    ):
        yield


def main(argv: list[str]) -> int:
    at = argv.index("--")
    sys.modules["sounddevice"] = FakeSoundDevice(
        [Device("Fake mic", rates=(16_000,))], clip=testing.say(argv[:at])
    )
    with oracle():
        return cli.main(argv[at + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
