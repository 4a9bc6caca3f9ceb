"""Options of `sparqle-stream serve`: where it listens, who may come, how much of everything.

Nothing heavy is imported: `--help` answers at once.
"""

from __future__ import annotations

import argparse

from sparqle_stream.config import EngineConfig


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("use a number above 0")
    return value


def add_to(parser: argparse.ArgumentParser) -> None:
    """Adds the groups `server`, `access` and `limits`."""
    _address(parser)
    _access(parser)
    _limits(parser)


def _address(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    add(
        "--port",
        type=int,
        default=8765,
        metavar="N",
        help="TCP port; 0 takes any free one (default %(default)s)",
    )
    add(
        "--wyoming-port",
        type=int,
        default=None,
        metavar="N",
        help="TCP port for Home Assistant's Wyoming protocol, which has no keys (default: none)",
    )
    add(
        "--tls-cert",
        default="",
        metavar="FILE",
        help="certificate in PEM, with --tls-key: serves https and wss (default: none)",
    )
    add("--tls-key", default="", metavar="FILE", help="private key of --tls-cert (default: none)")
    add(
        "--log",
        choices=("text", "json"),
        default="text",
        help="json: one object a line on stderr, with a record of every connection; no text that"
        " was said and no audio is ever logged (default %(default)s)",
    )


def _access(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("access").add_argument
    add(
        "--api-key",
        default="",
        metavar="KEY",
        help="key that clients must send; needed for other addresses than this machine's"
        " (default: none)",
    )
    add(
        "--key-file",
        default="",
        metavar="FILE",
        help="more keys, one a line; empty lines and lines with # do not count (default: none)",
    )
    add("--insecure", action="store_true", help="listen on other addresses without a key")
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web page that may connect, such as https://example.org, or * (may be repeated;"
        " default: pages of this machine)",
    )


def _limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits").add_argument
    add(
        "--slots",
        type=positive,
        default=EngineConfig().n_slots,
        metavar="N",
        help="streams at a time; further ones are told that the server is busy"
        " (default %(default)s)",
    )
    add(
        "--streams-per-key",
        type=int,
        default=0,
        metavar="N",
        help="streams at a time of one key, or of one address where no key is asked for; 0 for no"
        " limit (default %(default)s)",
    )
    add(
        "--max-stream-s",
        type=float,
        default=86_400.0,
        metavar="S",
        help="seconds that one stream may last (default %(default)s)",
    )
    add(
        "--frames-per-s",
        type=float,
        default=1000.0,
        metavar="N",
        help="frames a second that one client may send; the rest is read later"
        " (default %(default)s)",
    )
    add(
        "--idle-s",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds after which a client that sends nothing is closed (default %(default)s)",
    )
    add(
        "--drain-s",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that running streams may go on after SIGTERM (default %(default)s)",
    )
