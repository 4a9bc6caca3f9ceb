"""What streams cost in company: sessions that go through one batch in step, chunk by chunk.

Everything between PCM and events is done and counted, by stage, for each second of audio of each
stream: detector, the stages of the model, beam, writing, captions. Chunks follow each other as fast
as they go. Each stream hears the recording from another place on, so that segments begin and words
end at different times, as those of strangers do.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream import vad
from sparqle_stream.batch import Batch
from sparqle_stream.config import SAMPLE_RATE_HZ, EngineConfig
from sparqle_stream.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparqle_stream.config import StreamOptions
    from sparqle_stream.models import Model
    from sparqle_stream.stages import Floats
    from sparqle_stream.worker import Slots


def stage_ms(
    model: Model,
    options: StreamOptions,
    pcm: Floats,
    n_streams: int,
    make_slots: Callable[[Model, int], Slots] = Batch,
) -> tuple[dict[str, float], int]:
    """Milliseconds by stage for a second of one stream's audio, and how many words were written.

    pcm (S,) at 16 kHz; `n_streams` of one thread.
    """
    shifts = [len(pcm) * i // n_streams for i in range(n_streams)]
    heard = [np.concatenate([pcm[shift:], pcm[:shift]]) for shift in shifts]
    sessions = {
        row: Session(model, options, EngineConfig().context_words) for row in range(n_streams)
    }
    batch, spent, n_words = make_slots(model, n_streams), defaultdict[str, float](float), 0
    with batch.working(1):
        for row in sessions:
            batch.wipe(row)
        for at in range(0, len(pcm), options.chunk_samples):
            start = time.perf_counter()
            _listen(sessions, [one[at : at + options.chunk_samples] for one in heard])
            spent["vad"] += time.perf_counter() - start
            while ready := {row: s for row, s in sessions.items() if s.has_chunk}:
                start = time.perf_counter()
                result = batch.run(ready)
                n_words += sum(
                    _words(session, result.tokens[row]) for row, session in ready.items()
                )
                for stage, seconds in result.seconds.items():
                    spent[stage] += seconds
                spent["captions"] += time.perf_counter() - start - sum(result.seconds.values())
    per_second = 1000 * SAMPLE_RATE_HZ / (n_streams * len(pcm))
    return {stage: seconds * per_second for stage, seconds in spent.items()}, n_words


def _listen(sessions: dict[int, Session], parts: list[Floats]) -> None:
    vad.foresee([session.asked(parts[row]) for row, session in sessions.items()])
    for row, session in sessions.items():
        session.enqueue(session.listen(parts[row]))


def _words(session: Session, tokens: list[int]) -> int:
    """Tokens become events; how many final words are in them."""
    return sum(len(getattr(event, "words", ())) for event in session.take(tokens))
