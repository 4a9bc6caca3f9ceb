"""`sparqle-stream`: parse, call, print. The work is in the modules that each command imports.

Contract: exit 0 when all is done, 2 for an error that the user can mend (`error:` and `hint:` on
stderr, a traceback only with --debug), 1 for a bug (with its traceback) or when one of several
files failed, 130 after Ctrl-C, 141 when whoever read the output went away.
Nothing heavy is imported before a command needs it: `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING

from sparqle_stream import __version__, arguments
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.errors import ConfigError, SparqleError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Mapping, Sequence

    from sparqle_stream.engine import Engine

EXIT_FAILED_FILE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run one command; the process's exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(list(argv), os.environ if environ is None else environ)
    except SparqleError as err:
        report(err, with_traceback="--debug" in argv)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has left. Python would complain while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def report(err: SparqleError, *, prefix: str = "", with_traceback: bool = False) -> None:
    """`error:` and `hint:` on stderr."""
    if with_traceback:
        traceback.print_exception(err)
    print(f"error: {prefix}{err.message}", file=sys.stderr)
    if err.hint:
        print(f"hint: {err.hint}", file=sys.stderr)


def _dispatch(argv: list[str], environ: Mapping[str, str]) -> int:
    is_command = bool(argv) and argv[0] in arguments.COMMANDS
    command = argv.pop(0) if is_command else ""
    parser = arguments.parser_for(command)
    options = argv[: argv.index("--")] if "--" in argv else argv
    if "--version" in options:
        print(f"{arguments.PROG} {__version__}")
        return 0
    if "-h" in options or "--help" in options or (not command and not argv):
        # Before parsing: help is for people whose command line is not right yet.
        parser.print_help()
        return 0
    arguments.check_variables(environ)
    args = parser.parse(argv, environ)
    logging.basicConfig(
        level=logging.DEBUG if args.debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if getattr(args, "print_config", False):
        print(json.dumps(effective_config(args), indent=2))
        return 0
    return _COMMANDS[command or "transcribe"](args)


# --- options into configuration ----------------------------------------------------------------


def stream_options(args: Namespace) -> StreamOptions:
    """The per-stream part of the options; raises ConfigError."""
    return StreamOptions(
        chunk_ms=args.chunk_ms,
        delay_ms=args.delay_ms,
        prompt=args.prompt,
        vad=VadConfig(kind=args.vad, stop_ms=args.vad_stop),
    )


def engine_config(args: Namespace, n_slots: int = 1) -> EngineConfig:
    """The per-process part of the options; raises ConfigError."""
    if args.threads < 0:
        raise ConfigError(f"--threads {args.threads} cannot be used", hint="0 takes all cores")
    return EngineConfig(
        n_slots=n_slots,
        chunk_ms=args.chunk_ms,
        threads=args.threads,
        dtype=args.dtype,
        compute=args.compute,
    )


def effective_config(args: Namespace) -> dict[str, object]:
    """What --print-config shows."""
    return {
        "model": args.model,
        "llm": args.llm,
        "engine": asdict(engine_config(args, getattr(args, "slots", 1))),
        "stream": asdict(stream_options(args)),
    }


def load_engine(args: Namespace, n_slots: int = 1) -> Engine:
    """Model and engine as the options say."""
    cfg = engine_config(args, n_slots)
    from sparqle_stream import models
    from sparqle_stream.engine import Engine

    model = models.load(args.model, llm=args.llm, dtype=args.dtype, device=args.compute)
    return Engine(model, cfg)


# --- commands ----------------------------------------------------------------------------------


def _transcribe(args: Namespace) -> int:
    if args.help_markdown:
        print(arguments.markdown(), end="")
        return 0
    raise ConfigError("nothing to caption", hint="name files, or use --mic")


def _demo(args: Namespace) -> int:
    raise ConfigError("not there yet")


_COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "transcribe": _transcribe,
    "demo": _demo,
    "serve": _demo,
    "client": _demo,
    "doctor": _demo,
    "models": _demo,
}

if __name__ == "__main__":
    sys.exit(main())
