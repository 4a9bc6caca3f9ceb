"""Tables: pieces of a Markdown page that every section of the report needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.machine import MAX_BUSY_SHARE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Json = dict[str, Any]


FEWEST_GROUPS = 10  # that an interval is drawn from; of fewer a bootstrap makes it too narrow


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
    longest = "longest chunk and delay: " if result.get("mode") == "offline" else ""
    text = (
        f"{longest}{s['model']}, chunk {s['chunk_ms']} ms, delay {s['delay_ms']} ms, VAD {s['vad']}"
    )
    return f"{text}, {s['dtype']}" + (f", LLM {s['llm']}" if s["llm"] else "")


def conditions(result: Json, machines: Machines) -> str:
    """What the figures of a result were taken under, and a warning if the machine was not free."""
    timing, card = result["timing"], result["machine"]
    weights = f"weights `{card['weights_hash'][:12]}`, " if card["weights_hash"] else ""
    busy = f"; **the machine was busy** ({_taken(timing)})" if was_busy(result) else ""
    return f"{weights}commit `{card['commit']}`, machine {machines.label(card)}{busy}"


def was_busy(result: Json) -> bool:
    """Whether others used the machine, before a run or during it; False where nobody looked.

    Results whose own child processes were counted as others' do not say what was during it.
    """
    timing = result.get("timing", {})
    during = timing.get("others_share_during", 0.0) if result.get("bench") != "compare" else 0.0
    return bool(timing.get("machine_was_busy") or during > MAX_BUSY_SHARE)


def _taken(timing: Json) -> str:
    before = f"{timing['others_share_before']:.0%} of it taken before"
    during = timing.get("others_share_during")
    return before if during is None else f"{before}, {during:.0%} during the run"


def bound(result: Json) -> str:
    """The least time that reading the weights takes; '' where it is not known, and on CUDA, whose
    memory older results took for that of the host."""
    facts = result.get("bound")
    if not facts or result["settings"].get("compute", "cpu") != "cpu":
        return ""
    return (
        f" The bound of a chunk whose queries are read: at {facts['read_gb_per_s']:.1f} GB/s the "
        f"weights, read once, take {facts['chunk_ms_at_least']:.1f} ms (RTF "
        f"{facts['rtf_at_least']:.3f} if all chunks were such and no streams shared a pass)."
    )


def interval(speech: Json) -> list[float] | None:
    """The interval of a WER that may be shown: over speakers from ten on, else the wider of those
    over speakers and over utterances; none of fewer than ten utterances."""
    by_speaker: list[float] | None = speech["wer_interval_95_speakers"]
    by_utterance: list[float] | None = speech["wer_interval_95"]
    if by_speaker and len(speech["speakers"]) >= FEWEST_GROUPS:
        return by_speaker
    if speech["utterances"] < FEWEST_GROUPS:
        return None
    return wider(by_utterance, by_speaker)


def wider(*intervals: list[float] | None) -> list[float] | None:
    """The widest of those that are known."""
    known = [edges for edges in intervals if edges]
    return max(known, key=lambda edges: edges[1] - edges[0], default=None)


def number(value: float | None, n_digits: int) -> str:
    return "-" if value is None else f"{value:.{n_digits}f}"


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    columns = head.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
