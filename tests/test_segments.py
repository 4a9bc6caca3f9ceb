"""Segments: audio between starts and stops into chunks, with what had to be known for each."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_stream.segments import SegmentQueue


def ramp(start: int, end: int) -> np.ndarray:
    return np.arange(start, end, dtype=np.float32) + 1


def chunks(queue: SegmentQueue) -> list:
    out = []
    while queue.has_chunk:
        out.append(queue.next_chunk())
    return out


@settings(deadline=None)
@given(st.data())
def test_chunks_hold_every_sample_once(data):
    """Segments of any length in packets of any size: the chunks joined are the segment and zeros
    enough for `pad`, and nothing waits that is not in the count.
    """
    size, pad = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 40))
    queue, at, got, expected = SegmentQueue(size, pad), 0, [], []
    for _ in range(data.draw(st.integers(1, 3))):
        begin = at + data.draw(st.integers(0, 20))
        end = begin + data.draw(st.integers(0, 200))
        queue.begin(begin, begin + 5)
        assert queue.is_open
        assert queue.first_origin is not None
        at = begin
        while at < end:
            stop = min(end, at + data.draw(st.integers(1, 90)))
            n_new = queue.n_new
            queue.append(ramp(at, stop))
            assert queue.n_new - n_new == max(0, stop - max(at, begin + 5))
            at = stop
            if data.draw(st.booleans()):
                got += chunks(queue)
                assert queue.n_missing == size - (at - begin) % size
        n_quiet = data.draw(st.integers(0, min(50, end - begin)))
        queue.end(at + 7, n_quiet)
        assert queue.n_missing == size
        padded = end - begin + max(1, pad - n_quiet)
        padded += -padded % size
        expected.append(np.pad(ramp(begin, end), (0, padded - (end - begin))))
        at += 7
    got += chunks(queue)
    np.testing.assert_array_equal(np.concatenate([c.pcm for c in got]), np.concatenate(expected))
    assert queue.n_waiting == queue.n_new == 0
    assert queue.first_origin is None
    assert [c.known_at for c in got] == sorted(c.known_at for c in got)


def test_a_chunk_says_what_had_to_be_heard_for_it():
    queue = SegmentQueue(chunk_samples=10, pad_samples=4)
    queue.begin(100, known_at=115)  # speech from 100 on, known late
    queue.append(ramp(100, 118))
    assert queue.n_waiting == 18
    first = queue.next_chunk()
    assert (first.start, first.end, first.known_at, first.is_first) == (100, 110, 115, True)
    assert not queue.has_chunk
    assert queue.n_waiting == 8
    queue.append(ramp(118, 125))
    second = queue.next_chunk()
    assert (second.start, second.known_at, second.segment_end) == (110, 120, None)
    queue.end(known_at=140)
    last = queue.next_chunk()
    assert (last.start, last.known_at, last.segment_end) == (120, 140, 125)
    assert not queue.has_chunk


def test_the_first_chunk_has_what_was_heard_when_its_segment_was_known_of():
    """However much is there by the time it is asked for."""
    for heard in (115, 118, 150):
        queue = SegmentQueue(chunk_samples=10, pad_samples=4)
        queue.begin(100, known_at=115)
        queue.append(ramp(100, 115))
        queue.append(ramp(115, heard))
        first, *others = chunks(queue)
        np.testing.assert_array_equal(first.lead, ramp(100, 115))
        assert all(chunk.lead is None for chunk in others)
    queue = SegmentQueue(chunk_samples=10, pad_samples=4)
    queue.begin(100, known_at=100)
    queue.end(100)
    assert len(queue.next_chunk().lead) == 0


def test_a_chunk_knows_whether_somebody_speaks_when_it_is_complete():
    """In whatever order audio and pauses are told and chunks are asked for."""
    told = [(112, True), (125, False), (130, True), (141, False)]
    for n_ahead in range(len(told) + 1):
        queue, got = SegmentQueue(chunk_samples=10, pad_samples=0), []
        queue.begin(100, known_at=104)
        for known_at, is_on in told[:n_ahead]:
            queue.pause(known_at, is_on=is_on)
        at = 100
        for known_at, is_on in [*told[n_ahead:], (150, None)]:
            queue.append(ramp(at, known_at))
            at = known_at
            if is_on is not None:
                queue.pause(known_at, is_on=is_on)
            got += chunks(queue)
        assert [chunk.is_paused for chunk in got] == [False, True, True, True, False]
        queue.end(150)
        queue.begin(160, known_at=165)
        queue.append(ramp(160, 180))
        assert not any(chunk.is_paused for chunk in chunks(queue)), "a pause of another segment"


def test_silence_at_a_segments_end_is_padding():
    for n_quiet, n_chunks in ((0, 3), (1, 3), (2, 2), (17, 2)):
        queue = SegmentQueue(chunk_samples=10, pad_samples=5)
        queue.begin(0, 0)
        queue.append(ramp(0, 17))
        queue.end(17, n_quiet)
        found = chunks(queue)
        assert [chunk.segment_end for chunk in found] == [None] * (n_chunks - 1) + [17]


def test_the_last_chunk_waits_for_the_end_although_no_padding_is_needed():
    queue = SegmentQueue(chunk_samples=10, pad_samples=5)
    queue.begin(0, 0)
    queue.append(ramp(0, 20))
    assert [chunk.segment_end for chunk in chunks(queue)] == [None, None]
    queue.end(20, n_quiet=20)
    assert [chunk.segment_end for chunk in chunks(queue)] == [20]


def test_a_segment_waits_for_the_one_before():
    queue = SegmentQueue(chunk_samples=10, pad_samples=1)
    queue.begin(0, 0)
    queue.append(ramp(0, 3))
    queue.end(3)
    queue.begin(5, 5)
    queue.append(ramp(5, 30))
    assert queue.first_origin == 0
    assert [c.origin for c in chunks(queue)] == [0, 5, 5]
    assert queue.first_origin == 5
