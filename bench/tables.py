"""Tables: pieces of a Markdown page that every section of the report needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Json = dict[str, Any]


class Machines:
    """Gives every machine a letter the first time it is named."""

    def __init__(self) -> None:
        self._known: list[str] = []

    def label(self, card: Json) -> str:
        text = _machine(card)
        if text not in self._known:
            self._known.append(text)
        return chr(ord("A") + self._known.index(text))

    def section(self) -> list[str]:
        lines = [f"- **{chr(ord('A') + i)}**: {text}" for i, text in enumerate(self._known)]
        return ["## Machines", "\n".join(lines)] if lines else []


def _machine(card: Json) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in card["versions"].items())
    return (
        f"{card['cpu']} ({' '.join(card['cpu_flags']) or 'no vector units known'}), "
        f"{card['cores_allowed']} of {card['cores']} cores, threads: {card['threads']}, "
        f"{card['memory_gb']:.0f} GB, {card['system']}, Python {card['python']}; {versions}"
    )


def settings(result: Json) -> str:
    s = result["settings"]
    offline = "offline: " if result.get("mode") == "offline" else ""
    text = (
        f"{offline}{s['model']}, chunk {s['chunk_ms']} ms, delay {s['delay_ms']} ms, VAD {s['vad']}"
    )
    return f"{text}, {s['dtype']}" + (f", LLM {s['llm']}" if s["llm"] else "")


def conditions(result: Json, machines: Machines) -> str:
    """What the figures of a result were taken under, and a warning if the machine was not free."""
    timing, card = result["timing"], result["machine"]
    weights = f"weights `{card['weights_hash'][:12]}`, " if card["weights_hash"] else ""
    busy = f"; **the machine was busy** ({timing['others_share_before']:.0%} of it taken)"
    return (
        f"{weights}commit `{card['commit']}`, machine {machines.label(card)}"
        f"{busy if timing['machine_was_busy'] else ''}"
    )


def bound(result: Json) -> str:
    """The least time that reading the weights takes; '' where it is not known."""
    facts = result.get("bound")
    if not facts:
        return ""
    return (
        f" The bound: at {facts['read_gb_per_s']:.1f} GB/s the weights alone take "
        f"{facts['chunk_ms_at_least']:.1f} ms a chunk, RTF {facts['rtf_at_least']:.3f}."
    )


def number(value: float | None, n_digits: int) -> str:
    return "-" if value is None else f"{value:.{n_digits}f}"


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    columns = head.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
