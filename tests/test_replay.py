"""What a client remembers of a stream: the audio that is open, what was told, how long to try."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from sparqle_stream import messages
from sparqle_stream.replay import FLUSH, Patience, Progress, Replay, ReplayError


async def source(items):
    for item in items:
        yield item


def block(start: int, end: int) -> np.ndarray:
    return np.arange(start, end, dtype=np.float32)


async def read(replay: Replay, n: int | None = None) -> list:
    out = []
    async for item in replay.blocks():
        out.append(item)
        if len(out) == n:
            break
    return out


def flat(items) -> list[float]:
    return [x for item in items if item is not FLUSH for x in item.tolist()]


@pytest.mark.parametrize("seed", range(30))
def test_any_cuts_and_acknowledgements_bring_everything(seed):
    """Every connection gets the audio from the acknowledged sample on, whatever was read before."""
    rng = np.random.default_rng(seed)

    async def run() -> None:
        cuts = np.sort(rng.integers(0, 1000, 12))
        replay = Replay(source(np.split(block(0, 1000), cuts)))
        for _ in range(8):
            got = flat(await read(replay, int(rng.integers(1, 6))))
            assert got == [float(x) for x in range(replay.offset, replay.offset + len(got))]
            replay.acknowledge(replay.offset + int(rng.integers(0, len(got) + 1)))
        assert flat(await read(replay)) == [float(x) for x in range(replay.offset, 1000)]
        await replay.close()

    asyncio.run(run())


def test_a_flush_is_asked_again_until_it_is_answered():
    async def run() -> None:
        replay = Replay(source([block(0, 10), FLUSH, block(10, 20)]))
        assert await read(replay, 2)
        replay.acknowledge(10)
        again = await read(replay)
        assert again[0] is FLUSH
        assert flat(again) == flat([block(10, 20)])
        replay.answer_flush()
        assert FLUSH not in [x for x in await read(replay) if isinstance(x, type(FLUSH))]
        await replay.close()

    asyncio.run(run())


def test_a_block_under_way_survives_a_lost_connection():
    async def run() -> None:
        more = asyncio.Event()

        async def slow():
            yield block(0, 10)
            await more.wait()
            yield block(10, 20)

        replay = Replay(slow())
        reader = asyncio.create_task(read(replay, 2))
        await asyncio.sleep(0.01)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        more.set()
        assert flat(await read(replay)) == flat([block(0, 20)])
        await replay.close()

    asyncio.run(run())


def test_a_source_that_fails_is_heard_of():
    async def broken():
        yield block(0, 10)
        raise OSError("unplugged")

    async def run() -> None:
        with pytest.raises(OSError, match="unplugged"):
            await read(Replay(broken()))

    asyncio.run(run())


def test_memory_is_bounded():
    async def run() -> None:
        replay = Replay(source([block(i, i + 100) for i in range(0, 10_000, 100)]), max_kept=500)
        assert len(flat(await read(replay))) == 10_000
        assert sum(len(item.block) for item in replay._kept) <= 600
        with pytest.raises(ReplayError, match="not acknowledged"):
            await read(replay)
        replay.acknowledge(9_900)
        assert flat(await read(replay)) == flat([block(9_900, 10_000)])

    asyncio.run(run())


def test_nothing_is_told_twice():
    replay, progress = Replay(source([])), Progress()
    ready = messages.Ready("id", "m", 16_000, 320, 240)
    assert progress.note(ready, replay) == ready
    assert progress.note(ready, replay) is None
    started = messages.SpeechStarted(1.0)
    assert progress.note(started, replay) == started
    assert progress.note(started, replay) is None
    word = messages.Word("a", 1.0, 2.5, 3.0)
    progress.note(messages.Final("a", (word,), 0, 3.0), replay)
    assert progress.note(messages.Acknowledged(0, 0.0), replay) is None
    query = {"stream_id": "id", "offset": 7, "after": "2.500", "segment": 0, "pace": "file"}
    assert progress.query(7) == query
    assert progress.note(messages.SpeechStopped(3.0), replay) is not None
    assert progress.query(7) == query | {"segment": 1}


def test_patience():
    now = [0.0]
    patience = Patience(10.0, lambda: now[0])
    pauses = []
    for pause_s in patience.pauses():
        pauses.append(pause_s)
        now[0] += pause_s + 0.5
    assert pauses[0] == 0.0
    assert 7.5 < now[0] <= 12.0
    assert max(pauses) <= 2.0
    now[0] = 12.0
    assert list(patience.pauses()) == [], "a connection alone is no news"
    patience.renew(messages.Ready("id", "m", 16_000, 320, 240))
    assert list(patience.pauses()) == []
    patience.renew(messages.Acknowledged(0, 0.0))
    assert next(iter(patience.pauses())) == 0.0
