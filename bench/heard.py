"""What the ear alone would have written: greedy CTC text of the segments that a stream captioned.

In: a recording (S,). Out: the text on the CTC head's best path, in the segments and chunks, with
the padding and the gain of the engine's stream, so that it is the same path. What LLM and Q-Former
add to it or take from it is then one subtraction in one run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream.pieces import greedy_path
from sparqle_stream.session import Session, Start
from sparqle_stream.stages import prefix_ids
from sparqle_stream.writer import Greedy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparqle_stream.config import StreamOptions
    from sparqle_stream.models import Model
    from sparqle_stream.stages import Floats


def greedy_text(model: Model, options: StreamOptions, pcm: Floats) -> str:
    """pcm (S,) -> text of all segments, joined by spaces."""
    texts = [
        model.pieces.decode([piece for _, piece in greedy_path(log_probs)])
        for log_probs in posteriors(model, options, pcm)
    ]
    return " ".join(text for text in texts if text)


def posteriors(model: Model, options: StreamOptions, pcm: Floats) -> Iterator[Floats]:
    """pcm (S,) -> CTC log-probabilities (C, V) of every segment, padding included.

    They come late by the look-ahead, as in the engine.
    """
    session = Session(model, options, n_context_words=0)
    session.enqueue(session.listen(pcm))
    session.enqueue(session.flush())
    hear = _Ear(model, session.ahead_frames)
    path: list[Floats] = []
    while session.has_chunk:
        turn = session.next_turn()
        if turn.start is Start.SEGMENT:
            if path:
                yield np.concatenate(path)
                path = []
            hear.begin(turn.lead)
        path.append(hear(turn.pcm))
    if path:
        yield np.concatenate(path)


class _Ear:
    """Stages of one row: chunks of PCM (S,) -> log-probs (C, V); nothing is written."""

    def __init__(self, model: Model, ahead_frames: int) -> None:
        self._ahead_frames = ahead_frames
        self._stages = model.make_stages(1)
        self._stages.wipe(0)
        self._model = model

    def begin(self, lead: Floats | None) -> None:
        """A segment, of which lead (L,) was heard when it was known of."""
        leads = {} if lead is None else {0: lead}
        self._stages.begin({0: prefix_ids(self._model.tokenizer, "")}, leads)

    def __call__(self, pcm: Floats) -> Floats:
        heard: list[Floats] = []

        def hear(_row: int, log_probs: Floats) -> Greedy:
            heard.append(log_probs)
            return Greedy(n_most=0)

        with self._stages.working(0):
            self._stages.step({0: pcm}, {0: 0}, self._ahead_frames, hear)
        return heard[0]
