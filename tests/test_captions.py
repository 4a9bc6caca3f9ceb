"""Captions: tokens and CTC pieces in, final words with times and the grey tail out."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_stream.captions import (
    REPLACEMENT,
    Captions,
    Detokenizer,
    HeardPath,
    Spoken,
    align,
    fill_gaps,
    match_words,
)
from sparqle_stream.config import CaptionConfig
from sparqle_stream.pieces import greedy_path
from sparqle_stream.testing import PIECES, ByteTokenizer, WordTokenizer, tiny_pieces

CHUNK = 5120  # samples
DELAY = 3840
FRAMES = 8  # CTC frames of a chunk


@pytest.fixture(scope="module")
def pieces():
    return tiny_pieces()


def make(pieces, tokenizer=None, **changes) -> Captions:
    captions = Captions(CaptionConfig(**changes), tokenizer or WordTokenizer(), pieces, DELAY)
    captions.begin(0)
    return captions


def spell(text: str, n_frames: int = 0) -> list[int]:
    """Best CTC pieces: a frame per letter, a blank between words and where letters repeat."""
    out: list[int] = []
    for word in text.split():
        for i, letter in enumerate(word):
            piece = PIECES.index(letter if i else "▁" + letter)
            out += [0, piece] if out[-1:] == [piece] else [piece]
        out.append(0)
    return out + [0] * (n_frames - len(out))


def write(captions: Captions, text: str, at: int, *, is_complete: bool = True) -> Spoken:
    """`text` as the tokens of the chunk that ends at sample `at`."""
    tokens = captions._detokenizer.tokenizer.encode(text)
    return captions.write(tokens, is_complete=is_complete, chunk_end=at, emitted=at)


# --- text ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(), st.integers(0, 2**32 - 1))
def test_bytes_never_split_a_character(text, seed):
    """Any text in any packets of its bytes comes out whole, never with a broken character."""
    detokenizer, tokens, out = Detokenizer(ByteTokenizer()), ByteTokenizer().encode(text), ""
    rng = random.Random(seed)
    while tokens:
        n = rng.randint(1, 5)
        out += detokenizer.push(tokens[:n])
        tokens = tokens[n:]
        assert REPLACEMENT not in out
    shown = "".join(c for c in text if c.isspace() or not ("\0" <= c < " " or "\x7f" <= c < "\xa0"))
    assert out == shown.replace(REPLACEMENT, "")


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_do_not_stop_what_follows(data):
    detokenizer = Detokenizer(ByteTokenizer())
    detokenizer.push([2 + byte for byte in data])
    assert len(detokenizer.held) < 8
    assert detokenizer.push(ByteTokenizer().encode(" and on")).endswith(" and on")


@pytest.mark.parametrize("split", range(1, len(" naïve café, ok")))
def test_a_word_leaves_whole_or_when_the_model_stopped(pieces, split):
    """Whatever the chunk's last token was: an open word waits, unless the model chose to stop."""
    captions = make(pieces, ByteTokenizer(), max_tokens_per_s=1000.0)
    captions.hear(spell("naive cafe ok now"))
    tokens = ByteTokenizer().encode(" naïve café, ok")
    first = captions.write(tokens[:split], is_complete=False, chunk_end=CHUNK, emitted=CHUNK)
    assert first.text in ("", "naïve", "naïve café,")
    second = captions.write(tokens[split:], is_complete=True, chunk_end=CHUNK, emitted=CHUNK)
    assert first.text + second.text == "naïve café, ok"
    assert [w.text for w in (*first.words, *second.words)] == ["naïve", "café,", "ok"]


def test_a_piece_that_continues_an_emitted_word_is_appended(pieces):
    """The model stopped, so the word left; a late ending comes out without a space before it."""
    captions = make(pieces)
    captions.hear(spell("walk"))
    first = write(captions, " walk", CHUNK)
    captions.hear(spell("ing on"))
    second = write(captions, "ing on.", 2 * CHUNK)
    assert (first.text, second.text) == ("walk", "ing on.")
    assert [w.text for w in second.words] == ["ing", "on."]


def test_segments_are_joined_by_one_space(pieces):
    captions = make(pieces)
    captions.hear(spell("one two"))
    out = write(captions, " one\n\n two ", CHUNK).text
    captions.close(CHUNK, CHUNK)
    captions.begin(CHUNK)
    captions.hear(spell("three"))
    out += write(captions, "three", 3 * CHUNK).text
    assert out == "one two three"
    assert captions.context(2) == "two three"


def test_what_is_open_leaves_at_the_end_of_a_segment(pieces):
    captions = make(pieces)
    captions.hear(spell("unfinished"))
    assert write(captions, " unfin", CHUNK, is_complete=False).text == ""
    assert captions.close(CHUNK, CHUNK).text == "unfin"
    assert captions.tail == ""


# --- times ---------------------------------------------------------------------------------------


def test_words_have_the_times_at_which_ctc_heard_them(pieces):
    """CTC frame c lies at 640 c - 320; a word reaches 40 ms past both of its outer pieces."""
    captions = make(pieces)
    captions.hear([0, 0, *spell("the cat"), 0, 0, 0])
    spoken = write(captions, " The cat,", 4 * CHUNK)
    assert [(w.text, w.start, w.end) for w in spoken.words] == [
        ("The", 2 * 640 - 320 - 640, 5 * 640 - 320 + 640),
        ("cat,", 5 * 640 - 320 + 640, 9 * 640 - 320 + 640),
    ]


@pytest.mark.parametrize(
    ("written", "heard", "spans"),
    [
        ("the cat", " the cat", [(1, 3), (5, 7)]),
        ("finally the one party", " finlythe oe pardy", [(1, 5), (6, 8), (10, 11), (13, 17)]),
        ("cat", " the cat sat", [(5, 7)]),  # the LLM left a word out
        ("exulting", " exalting", [(1, 8)]),
        ("1945", " nineteen forty five", [None]),
        ("a xyz cat", " a cat", [(1, 1), None, (3, 5)]),
        ("word", "", [None]),
        ("the the", " the the the", [(1, 3), (5, 7)]),  # ties go to what was heard first
    ],
)
def test_spelling_need_not_agree(written, heard, spans):
    assert match_words(written.split(), list(heard))[0] == spans


@settings(deadline=None)
@given(st.text("ab ", max_size=12), st.text("ab ", max_size=12))
def test_an_alignment_is_monotone_and_inside(written, heard):
    pairs = [p for p in align(written, heard) if p >= 0]
    assert pairs == sorted(set(pairs))
    assert all(0 <= p < len(heard) for p in pairs)


@settings(deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=6),
    st.integers(0, 50),
    st.integers(0, 60),
    st.integers(1, 30),
)
def test_guessed_times_lie_between_their_neighbours(known, first, length, width):
    spans = [(first + 10 * i, first + 10 * i + 5) if k else None for i, k in enumerate(known)]
    filled = fill_gaps(spans, first, first + length, width)
    assert len(filled) == len(spans)
    for given_span, span in zip(spans, filled, strict=True):
        assert span == given_span or (given_span is None and 0 <= span[1] - span[0] <= width)


words_st = st.lists(st.text("abcdeé,.", min_size=1, max_size=6), max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_text_is_append_only_and_times_are_in_order(data):
    """Whatever the LLM writes and CTC hears: text only grows by what is handed out, words and
    text agree, and start <= end <= emitted with nothing running backwards.
    """
    captions, at, transcript, last = make(tiny_pieces()), 0, "", 0
    for _ in range(data.draw(st.integers(1, 8))):
        at += CHUNK
        event = data.draw(st.sampled_from(["chunk", "chunk", "chunk", "seam", "segment"]))
        outs = []
        if event == "seam":
            captions.seam(at - CHUNK, may_repeat=data.draw(st.booleans()))
        if event == "segment":
            outs.append(captions.close(at, at))
            captions.begin(at)
        heard = data.draw(st.text("abcde ", max_size=8))
        captions.hear(spell(heard, FRAMES)[:FRAMES])
        text = " ".join(data.draw(words_st))
        text = data.draw(st.sampled_from(["", " "])) + text
        outs.append(write(captions, text, at, is_complete=data.draw(st.booleans())))
        for spoken in outs:
            transcript += spoken.text
            assert re.sub(r"\s", "", spoken.text) == "".join(w.text for w in spoken.words)
            for word in spoken.words:
                assert last <= word.start <= word.end <= at
                last = word.end
    assert transcript == " ".join(transcript.split())


def test_memory_is_bounded(pieces):
    """CTC that hears an hour of letters which nobody writes is forgotten, not kept."""
    captions = make(pieces)
    for chunk in range(2000):
        captions.hear(spell("abcdefg"))
        write(captions, " word", (chunk + 1) * CHUNK)
    assert len(captions.heard.letters) <= 160
    assert len(captions._context) <= 400


# --- the grey tail -------------------------------------------------------------------------------


def test_the_tail_is_what_ctc_heard_after_the_last_word(pieces):
    captions = make(pieces)
    captions.hear(spell("the cat sat"))
    assert captions.tail == "the cat sat"
    write(captions, " The cat", 2 * CHUNK)
    assert captions.tail == "sat"
    captions.hear(spell("down"))
    assert captions.tail == "sat down"
    write(captions, " sat down", 3 * CHUNK)
    assert captions.tail == ""


def test_the_tail_forgets_what_nobody_wrote(pieces):
    captions = make(pieces, tail_s=1.0)
    captions.hear(spell("old"))
    captions.hear([0] * 26)
    captions.hear(spell("new"))
    assert captions.tail == "new"


def test_a_chunk_edge_is_nothing_to_the_path(pieces):
    """A piece that sounds across the edge of a chunk is heard once, as by `ctc.greedy_path`."""
    torch = pytest.importorskip("torch")
    gen = torch.Generator().manual_seed(0)
    log_probs = torch.randn(400, 5, generator=gen)
    log_probs[1::2] = log_probs[::2]  # every piece lasts at least two frames
    path = "".join(pieces.piece(p) for _, p in greedy_path(log_probs))
    best = log_probs.argmax(dim=-1).tolist()
    for size in (1, 3, 8, 400):
        heard = HeardPath(pieces)
        heard.letters = type(heard.letters)()  # without its limit
        for start in range(0, len(best), size):
            heard.hear(best[start : start + size])
        assert "".join(x.text for x in heard.letters) == path
        assert [x.frame for x in heard.letters][::2] == [f for f, _ in greedy_path(log_probs)]


# --- rule 9: no text out of nothing --------------------------------------------------------------


def test_silence_to_ctc_allows_no_text(pieces):
    captions = make(pieces)
    for _ in range(30):
        captions.hear([0] * FRAMES)
        assert captions.allowance(CHUNK) == 0


def test_text_must_be_paid_for_by_what_was_heard(pieces):
    """A model that writes as much as it may gets some letters more than CTC heard, not pages."""
    captions = make(pieces)
    captions.hear(spell("hello"))
    n_letters, at = 0, 0
    for _ in range(40):
        at += CHUNK
        n = captions.allowance(CHUNK)
        words = " ".join(f"w{at + i}" for i in range(n))
        n_letters += sum(c.isalnum() for c in write(captions, " " + words if n else "", at).text)
        captions.hear([0] * FRAMES)
    assert captions.allowance(CHUNK) == 0
    assert 5 <= n_letters <= 60


def test_tokens_per_second_are_capped(pieces):
    """12 a second in the long run, a second's worth saved up at most."""
    captions, n = make(pieces, letters_per_heard=100.0), 0
    captions.hear([0] * FRAMES)
    for chunk in range(100):
        captions.hear(spell("abcdefgh"))
        n_allowed = captions.allowance(CHUNK)
        assert n_allowed <= captions.max_allowance(CHUNK) == 15
        n += n_allowed
        write(captions, "".join(f" {chunk}x{i}" for i in range(n_allowed)), (chunk + 1) * CHUNK)
    assert abs(n - 12 * 32) <= 12


@pytest.mark.parametrize("period", range(1, 7))
def test_a_loop_stops_the_text(pieces, period):
    captions, said = make(pieces), ""
    for chunk in range(40):
        captions.hear(spell("abcdefg"))
        assert captions.allowance(CHUNK) > 0
        spoken = write(captions, f" w{chunk % period}", (chunk + 1) * CHUNK)
        said += spoken.text
        if captions.is_looping:
            break
    assert captions.is_looping
    assert len(said.split()) == 17  # the 18th token made three times six
    assert captions.allowance(CHUNK) == 0
    captions.seam(10 * CHUNK, may_repeat=True)
    captions.hear(spell("abcdefg"))
    assert not captions.is_looping
    assert captions.context(8) == ""  # what led to the loop does not prime the next slot
    assert captions.allowance(CHUNK) > 0


def test_repetition_in_speech_is_no_loop(pieces):
    captions = make(pieces)
    captions.hear(spell("no no no no no very very very good good"))
    write(captions, " no no no no no very very very good good", CHUNK)
    assert not captions.is_looping


def test_speech_without_text_is_told_once(pieces):
    captions, told = make(pieces), []
    for chunk in range(1, 40):
        if chunk == 20:
            captions.hear(spell("yes"))
            write(captions, " yes", chunk * CHUNK)
        if captions.is_newly_mute(chunk * CHUNK, is_speech=True):
            told.append(chunk)
    assert told == [10, 30]  # 3.2 s after the start, and after the word


def test_silence_without_a_detector_is_no_speech(pieces):
    captions = make(pieces)
    captions.hear([0] * FRAMES)
    assert not captions.is_newly_mute(100 * CHUNK, is_speech=False)
    captions.hear(spell("hm"))
    assert captions.is_newly_mute(101 * CHUNK, is_speech=False)


# --- seams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (" the cat", ""),  # the model repeats its context
        (" the cat sat", " sat"),
        (" sat", " sat"),
        (" cat sat", " sat"),
        (" the dog", " the dog"),  # not what was said before
    ],
)
def test_words_of_the_context_are_not_said_twice(pieces, after, expected):
    captions = make(pieces)
    captions.hear(spell("i saw the cat"))
    write(captions, " I saw the cat", 3 * CHUNK)
    captions.seam(3 * CHUNK, may_repeat=True)
    captions.hear(spell("sat down"))
    assert write(captions, after, 4 * CHUNK).text == expected


def test_words_that_are_said_again_after_a_seam_stay(pieces):
    """CTC heard them once more: the speaker repeated them, not the model."""
    captions = make(pieces)
    captions.hear(spell("very good"))
    write(captions, " very good", 2 * CHUNK)
    captions.seam(3 * CHUNK, may_repeat=True)
    captions.hear(spell("very good"))
    assert write(captions, " very good", 4 * CHUNK).text == " very good"


def test_a_writer_that_never_repeats_is_believed(pieces):
    """A beam may have heard again what CTC's best path did not."""
    captions = make(pieces)
    captions.hear(spell("no"))
    write(captions, " no", 2 * CHUNK)
    captions.seam(2 * CHUNK, may_repeat=False)
    captions.hear(spell("m"))
    assert write(captions, " no", 3 * CHUNK).text == " no"


def test_a_word_that_was_open_at_a_seam_leaves_with_the_next_chunk(pieces):
    """It was neither written nor said to the next slot when a chunk had used up its allowance."""
    captions = make(pieces)
    captions.hear(spell("alpha beta"))
    assert write(captions, " alpha beta", 2 * CHUNK, is_complete=False).text == "alpha"
    captions.seam(2 * CHUNK, may_repeat=True)
    assert captions.context(8) == "alpha beta"
    captions.hear(spell("gamma"))
    spoken = write(captions, " gamma", 4 * CHUNK)
    assert spoken.text == " beta gamma"
    assert [word.text for word in spoken.words] == ["beta", "gamma"]


def test_a_mark_that_stands_alone_takes_no_time(pieces):
    """It took all that was heard until then, and the next word had no time of its own."""
    captions = make(pieces)
    captions.hear(spell("hello world", 12))
    (hello,) = write(captions, " hello", 14 * 640).words
    captions.hear([0] * 8)
    (comma,) = write(captions, ",", 22 * 640).words
    assert comma.start == comma.end == hello.end
    (world,) = write(captions, " world", 22 * 640).words
    assert world.start < world.end - 1_000


def test_a_seam_is_looked_for_where_nothing_is_pending(pieces):
    captions = make(pieces)
    captions.hear(spell("word", 8))
    assert not captions.is_quiet()
    captions.hear([0] * 8)
    assert captions.is_quiet()
