"""References: other recognisers beside ours, on the same recordings in the same run, or published.

Measured ones are those of bench.peers that have weights of their own; each recording goes to them
at once, as they come, in this process. Published ones are what papers say of whole test sets:
another scorer, other recordings where the set differs, offline; they are named as published, with
their source, and never stand for something that was measured here.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from bench import captioned, peers, scoring
from bench.peers import OURS, PEERS
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.manifests import RecordingSet
    from bench.peers import Hear
    from bench.settings import Settings

    Json = dict[str, Any]

WARM_UP_SAMPLES = 3 * SAMPLE_RATE_HZ
CLEAN, OTHER = "LibriSpeech test-clean", "LibriSpeech test-other"
V1 = "Jeffries et al., 2024, arXiv 2410.15608, and its README"
V2 = "model cards of UsefulSensors/moonshine-streaming-*"
# system, WER on test-clean and test-other in per cent, source
PUBLISHED = (
    ("Whisper tiny.en", 5.66, 15.45, V1),
    ("Whisper base.en", 4.25, 10.35, V1),
    ("Moonshine tiny", 4.52, 11.71, V1),
    ("Moonshine base", 3.23, 8.18, V1),
    ("Moonshine streaming tiny", 4.49, 12.09, V2),
    ("Moonshine streaming small", 2.49, 6.78, V2),
)


def names() -> list[str]:
    """Recognisers that can be asked for."""
    real = [name for name, peer in PEERS.items() if peer.has_real_weights]
    return [name for name in real if name != OURS and not PEERS[name].wants_weights]


def require(wanted: Sequence[str]) -> None:
    """Raises ConfigError for what nobody knows, and for what is not installed."""
    for name in wanted:
        if name not in names():
            raise ConfigError(f"unknown reference {name!r}", hint=", ".join(names()))
        peers.require(name)


def measure(
    wanted: Sequence[str], settings: Settings, sets: Sequence[RecordingSet], scorer: scoring.Scorer
) -> list[Json]:
    """A row of each recogniser on each set of speech that was not joined: they work offline."""
    speech = [s for s in sets if s.joined_to_s is None and any(r.text for r in s.recordings)]
    rows: list[Json] = []
    for name in wanted:
        hear = PEERS[name].make(settings)
        rows += [_row(name, hear, one, scorer) for one in speech]
    return rows


def _row(name: str, hear: Hear, of_set: RecordingSet, scorer: scoring.Scorer) -> Json:
    speech = [one for one in of_set.recordings if one.text]
    hear(speech[0].pcm()[:WARM_UP_SAMPLES], 1)
    tallies, seconds, n_samples = [], 0.0, 0
    for one in captioned.with_bar(speech, f"{name} {of_set.label}", len(speech)):
        pcm = one.pcm()
        start = time.perf_counter()
        text = hear(pcm, peers.tokens_for(one.text, len(pcm)))
        seconds += time.perf_counter() - start
        n_samples += len(pcm)
        tallies.append(scorer.score(one.text, text))
    audio_s = n_samples / SAMPLE_RATE_HZ
    return {
        "system": name,
        "what": PEERS[name].what,
        "version": PEERS[name].version(),
        "set": of_set.name,
        "condition": of_set.condition,
        **scoring.summary(scoring.total(tallies)),
        "wer_interval_95": scoring.interval(tallies),
        "audio_seconds": round(audio_s, 2),
        "rtf": round(seconds / audio_s, 4) if audio_s else None,
    }


def published() -> list[Json]:
    """Rows of papers, as JSON."""
    return [
        {"system": system, "published": True, "set": of, "wer_percent": wer, "source": source}
        for system, clean, other, source in PUBLISHED
        for of, wer in ((CLEAN, clean), (OTHER, other))
    ]
