"""Writers: what LLM and CTC agree on is written, as far as it is due; and the contract holds."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparqle_stream import messages, testing
from sparqle_stream.captions import Captions
from sparqle_stream.config import (
    CHUNK_MS_RANGE,
    BeamConfig,
    CaptionConfig,
    EngineConfig,
    StreamOptions,
    VadConfig,
    WriterConfig,
)
from sparqle_stream.engine import Engine
from sparqle_stream.errors import ConfigError
from sparqle_stream.word_beam import WordBeam
from sparqle_stream.writer import MOST_WORD_TOKENS, Greedy, Hearing, Joint
from tests.lexicons import lexicon_of
from tests.prefixes import prefix_of

CFG = WriterConfig(
    llm_weight=1.0,
    mark_odds=3.0,
    mark_margin=0.0,
    case_margin=0.0,
    sure=0.8,
    patience_frames=20,
)
OFF = StreamOptions(vad=VadConfig(kind="off"))
TEXTS = [[a, b] for a in ("cat", "car", "sat", "a") for b in ("cat", "car", "sat", "a")]


class Vocabulary:
    """Tokens of a fixed list; other text is spelled in letters, which come first."""

    words = (" cat", " Cat", " car", " sat", " s", "at", ".", ",", "?", "!", "<s>")
    bos_id = len(testing.LETTERS) + len(words)

    def __init__(self) -> None:
        self.tokens = [*testing.LETTERS, " ", *self.words]

    def encode(self, text: str) -> list[int]:
        if text in self.tokens:
            return [self.tokens.index(text)]
        return [self.tokens.index(x) for x in text if x in self.tokens]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.tokens[i] for i in ids)


@pytest.fixture
def vocabulary():
    return Vocabulary()


@pytest.fixture(scope="module")
def lexicon():
    return lexicon_of(TEXTS)


def frames(lexicon, *words: str, gap: int = 4, sure: float = 0.9) -> np.ndarray:
    """Log-probabilities (T, V) of words, a letter a frame; what is left goes to all pieces."""
    letters = [x for word in words for x in [" " + word[0], *word[1:], *[""] * gap]]
    probs = np.full((len(letters), len(lexicon.pieces)), (1 - sure) / (len(lexicon.pieces) - 1))
    for t, letter in enumerate(letters):
        probs[t, lexicon.pieces.index(letter)] = sure
    return np.log(probs).astype(np.float32)


def hearing(vocabulary, lexicon, log_probs) -> Hearing:
    beam = WordBeam(lexicon, BeamConfig())
    beam.hear(log_probs)
    return Hearing(CFG, vocabulary, beam)


def write_all(joint: Joint, vocabulary, odds: dict[str, float], stop: float = 40.0) -> list[str]:
    """What a writer writes when the LLM always has the same odds; -6 for what has none."""
    out = []
    while joint.goes_on(stop):
        ids = joint.suggest()
        picked = joint.pick(ids, [odds.get(vocabulary.decode([i]), -6.0) for i in ids])
        if not picked:
            break
        out.append(vocabulary.decode(picked))
    return out


def test_what_was_heard_outweighs_what_the_llm_expects(vocabulary, lexicon):
    heard = hearing(vocabulary, lexicon, frames(lexicon, "cat", "sat", gap=12, sure=0.999))
    assert write_all(Joint(heard, 9, 0), vocabulary, {" car": -0.1, ".": -9.0}) == [" cat", " sat"]


def cat_or_car(lexicon, *rest: str, gap: int) -> np.ndarray:
    """The first word is either, as likely."""
    unsure = frames(lexicon, "cat", *rest, gap=gap)
    unsure[2] = np.logaddexp(unsure[2], frames(lexicon, "car")[2]) - np.log(2)
    return unsure


def test_the_llm_decides_where_hearing_is_unsure(vocabulary, lexicon):
    unsure = cat_or_car(lexicon, gap=CFG.patience_frames)
    for best, other in ((" cat", " car"), (" car", " cat")):
        heard = hearing(vocabulary, lexicon, unsure)
        assert write_all(Joint(heard, 9, 0), vocabulary, {best: -0.5, other: -3.0}) == [best]


def test_case_is_the_llms(vocabulary, lexicon):
    heard = hearing(vocabulary, lexicon, frames(lexicon, "cat", gap=14))
    assert write_all(Joint(heard, 9, 0), vocabulary, {" Cat": -0.5, " cat": -1.0}) == [" Cat"]


def test_a_word_waits_for_its_delay_and_its_end(vocabulary, lexicon):
    """Heard words end at frames 3 and 10 of 14: with a delay of 5 only the first is due."""
    heard = hearing(vocabulary, lexicon, frames(lexicon, "cat", "sat"))
    assert write_all(Joint(heard, 9, n_delay=5), vocabulary, {}) == [" cat"]
    assert write_all(Joint(heard, 9, n_delay=0), vocabulary, {}) == []  # nothing followed yet
    heard.beam.hear(frames(lexicon, "sat", gap=12)[3:])  # half a second of blanks
    assert write_all(Joint(heard, 9, n_delay=5), vocabulary, {}) == [" sat"]


def test_an_unsure_word_waits_for_what_is_said_next_but_not_for_ever(vocabulary, lexicon):
    unsure = cat_or_car(lexicon, "sat", "a", gap=3)
    assert write_all(Joint(hearing(vocabulary, lexicon, unsure), 9, 0), vocabulary, {}) == []
    sure = hearing(vocabulary, lexicon, frames(lexicon, "cat", "sat", "a", gap=3))
    assert write_all(Joint(sure, 9, 0), vocabulary, {}) == [" cat", " sat"]
    old = hearing(vocabulary, lexicon, cat_or_car(lexicon, "sat", "a", gap=CFG.patience_frames))
    assert len(write_all(Joint(old, 9, 0), vocabulary, {})) == 3
    ended = Joint(hearing(vocabulary, lexicon, unsure), 9, 0, is_last=True)
    assert len(write_all(ended, vocabulary, {})) == 3


def test_in_a_pause_what_was_heard_waits_for_nothing_but_its_delay(vocabulary, lexicon):
    """Neither for the next word nor for agreement; `gap` frames passed since the last piece."""
    for gap, n_delay, n_written in ((3, 0, 2), (3, 4, 1), (2, 0, 1)):
        heard = hearing(vocabulary, lexicon, cat_or_car(lexicon, "sat", gap=gap))
        assert write_all(Joint(heard, 9, n_delay), vocabulary, {}) == []
        heard.is_paused = True
        assert len(write_all(Joint(heard, 9, n_delay), vocabulary, {})) == n_written


def test_punctuation_must_beat_the_word_by_its_margin(vocabulary, lexicon):
    odds = {" cat": 2.0, " sat": 2.0, ",": 3.0}
    for margin, written in ((0.0, [" cat", ",", " sat"]), (1.5, [" cat", " sat"])):
        h = hearing(vocabulary, lexicon, frames(lexicon, "cat", "sat"))
        h.cfg = replace(CFG, mark_margin=margin)
        assert write_all(Joint(h, 40, 0, is_last=True), vocabulary, odds) == written


def test_an_unusual_letter_must_beat_the_usual_one_by_its_margin(vocabulary, lexicon):
    """A capital within a sentence, a small letter at its beginning."""
    heard = frames(lexicon, "cat", "cat")
    small, capital = {" cat": 2.0, " Cat": 1.0}, {" cat": 1.0, " Cat": 2.0}
    for margin, odds, written in (
        (0.0, small, [" cat", " cat"]),
        (1.5, small, [" Cat", " cat"]),
        (0.0, capital, [" Cat", " Cat"]),
        (1.5, capital, [" Cat", " cat"]),
    ):
        h = hearing(vocabulary, lexicon, heard)
        h.cfg = replace(CFG, case_margin=margin)
        assert write_all(Joint(h, 40, 0, is_last=True), vocabulary, odds) == written


def test_a_segments_end_makes_everything_due(vocabulary, lexicon):
    heard = hearing(vocabulary, lexicon, frames(lexicon, "cat", "sat", gap=1))
    assert write_all(Joint(heard, 9, 9, is_last=True), vocabulary, {}) == [" cat", " sat"]


def test_a_word_of_several_tokens_is_written_whole(vocabulary, lexicon):
    heard = hearing(vocabulary, lexicon, frames(lexicon, "a", "sat", gap=12))
    vocabulary.tokens[vocabulary.tokens.index(" sat")] = "(gone)"
    joint = Joint(heard, 9, 0)
    assert write_all(joint, vocabulary, {}) == [" a", " sat"]
    assert joint.n_written == 2 + 4


def test_an_endless_word_is_cut_and_what_follows_is_written(vocabulary):
    """It could have filled more of a slot than is kept free for a chunk, which ended the stream."""
    endless = "sac" * 14
    lexicon = lexicon_of([[endless, "cat"]])
    heard = hearing(vocabulary, lexicon, frames(lexicon, endless, "cat", gap=12, sure=0.999))
    cut = endless[: MOST_WORD_TOKENS - 1]  # its space is a token of this vocabulary, too
    assert write_all(Joint(heard, 9, 0), vocabulary, {}) == [f" {cut}"]
    assert write_all(Joint(heard, 9, 0), vocabulary, {" cat": -0.1}) == [" cat"]


def test_a_word_fits_into_what_the_shortest_chunk_may_add_to_a_slot(tiny):
    captions = Captions(CaptionConfig(), tiny.tokenizer, tiny.pieces, 0)
    shortest = StreamOptions(chunk_ms=CHUNK_MS_RANGE[0]).chunk_samples
    assert captions.max_allowance(shortest) >= MOST_WORD_TOKENS


def test_punctuation_follows_a_word_once_where_the_llm_prefers_it(vocabulary, lexicon):
    heard = hearing(vocabulary, lexicon, frames(lexicon, "cat", "sat", gap=14))
    odds = {",": -0.1, " cat": -2.0, " sat": -2.0, ".": -1.0}
    assert write_all(Joint(heard, 9, 0), vocabulary, odds) == [" cat", ",", " sat"]
    assert write_all(Joint(heard, 9, 0), vocabulary, odds, stop=40.0) == []
    del odds[","]
    assert write_all(Joint(heard, 9, 0), vocabulary, odds, stop=-40.0) == ["."]
    assert write_all(Joint(heard, 9, 0), vocabulary, odds, stop=-40.0) == []


def test_no_more_than_allowed_and_the_rest_later(vocabulary, lexicon):
    heard = hearing(vocabulary, lexicon, frames(lexicon, "cat", "sat", "cat", gap=12))
    assert write_all(Joint(heard, 2, 0), vocabulary, {}) == [" cat", " sat"]
    assert write_all(Joint(heard, 0, 0), vocabulary, {}) == []
    assert write_all(Joint(heard, 2, 0), vocabulary, {}) == [" cat"]


def test_greedy_writes_until_the_stop_head_says_so():
    greedy = Greedy(n_most=2)
    assert not greedy.goes_on(1.0)
    assert [greedy.pick([5, 6], [-1.0, -2.0]) for _ in range(2) if greedy.goes_on(-1.0)] == [
        [5]
    ] * 2
    assert not greedy.goes_on(-1.0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ConfigError, match="sure"):
        WriterConfig(sure=share)


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_a_weight_below_zero_is_refused(weight):
    for name in ("llm_weight", "text_weight"):
        with pytest.raises(ConfigError, match="must be 0 or more"):
            WriterConfig(**{name: weight})


@pytest.mark.parametrize("n", [1, 9])
def test_one_rival_is_none_and_nine_are_too_many(n):
    with pytest.raises(ConfigError, match="rivals"):
        WriterConfig(n_rivals=n)


# --- readings that are judged -------------------------------------------------------------------

JUDGED = replace(CFG, text_weight=1.0, text_share=0.0, text_bonus=0.0, rival_gap=20.0)


def judged(vocabulary, lexicon, log_probs, cfg=JUDGED, **options) -> Joint:
    heard = hearing(vocabulary, lexicon, log_probs)
    heard.cfg, heard.is_judged = cfg, True
    return Joint(heard, 9, 0, **options)


def judge(joint: Joint, vocabulary, liked: str) -> list[str]:
    """Tells the writer that readings that begin with a text are likely; what it was in doubt of."""
    doubts = [vocabulary.decode(ids) for ids in joint.doubts()]
    joint.judged([0.0 if text.startswith(liked) else -50.0 for text in doubts])
    return doubts


def test_rival_readings_are_judged_as_a_whole(vocabulary, lexicon):
    """What the second word makes of the first counts too."""
    unsure = cat_or_car(lexicon, "sat", gap=CFG.patience_frames)
    for liked, written in ((" cat", [" cat", " sat"]), (" car", [" car", " sat"])):
        joint = judged(vocabulary, lexicon, unsure, is_last=True)
        doubts = judge(joint, vocabulary, liked + " sat")
        assert {" cat sat", " car sat"} <= set(doubts)
        assert write_all(joint, vocabulary, {}) == written


def test_nobody_is_asked_where_there_is_no_doubt(vocabulary, lexicon):
    sure = frames(lexicon, "cat", "sat", gap=12, sure=0.99999)
    assert judged(vocabulary, lexicon, sure, replace(JUDGED, rival_gap=3.0)).doubts() == []
    unsure = cat_or_car(lexicon, gap=CFG.patience_frames)
    assert judged(vocabulary, lexicon, unsure).doubts()
    assert judged(vocabulary, lexicon, unsure[:3]).doubts() == []  # nothing is due
    unable = judged(vocabulary, lexicon, unsure)
    unable.hearing.is_judged = False
    assert unable.doubts() == []
    assert Greedy(3).doubts() == Greedy(3).plain() == []


def test_as_many_rivals_as_are_allowed_the_likeliest_first(vocabulary, lexicon):
    unsure = cat_or_car(lexicon, "sat", "a", gap=CFG.patience_frames)
    joint = judged(vocabulary, lexicon, unsure, is_last=True)
    scores = [reading.score for reading in joint.hearing.rivals()]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == JUDGED.n_rivals
    few = judged(vocabulary, lexicon, unsure, replace(JUDGED, n_rivals=2), is_last=True)
    assert len(few.doubts()) == 2


def test_what_was_judged_holds_for_the_words_after_the_first(vocabulary, lexicon):
    sure_then_not = frames(lexicon, "sat", gap=4)
    unsure = np.concatenate([sure_then_not, cat_or_car(lexicon, gap=CFG.patience_frames)])
    for liked in (" cat", " car"):
        joint = judged(vocabulary, lexicon, unsure, is_last=True)
        assert joint.doubts() == []  # the first word is sure
        joint.hearing.beam.commit("sat")
        joint = Joint(joint.hearing, 9, 0, is_last=True)
        judge(joint, vocabulary, liked)
        assert write_all(joint, vocabulary, {}) == [liked]


def test_plain_text_is_words_and_where_sentences_begin(vocabulary, lexicon):
    joint = judged(vocabulary, lexicon, frames(lexicon, "cat", gap=14))
    assert joint.goes_on(0.0)
    ids = joint.suggest()
    assert vocabulary.decode(joint.pick(ids, [1.0 if i == ids[1] else 0.0 for i in ids])) == " Cat"
    assert vocabulary.decode(joint.plain()) == " cat"
    for mark, plain_text in ((",", []), (".", [vocabulary.bos_id])):
        joint.hearing.may_mark, joint._is_known = True, False
        assert joint.goes_on(-40.0)
        ids = joint.suggest()
        joint.pick(ids, [float(i == vocabulary.encode(mark)[0]) for i in ids])
        assert joint.plain() == plain_text


def test_the_n_grams_share_is_taken_off_what_is_judged(vocabulary, lexicon):
    joint = judged(vocabulary, lexicon, cat_or_car(lexicon, gap=CFG.patience_frames))
    reading = joint.hearing.rivals()[0]
    cfg = replace(JUDGED, text_weight=0.5, text_share=0.25, text_bonus=2.0)
    joint.hearing.cfg = cfg
    n = len(reading.words)
    assert joint.hearing.gain(reading, -4.0) == pytest.approx(
        -2.0 + 2.0 * n - 0.25 * reading.gram_score
    )


# --- the contract, with a whole engine ------------------------------------------------------------


def plain(events) -> list[object]:
    return [
        e if isinstance(e, messages.Tail) else (e.text, e.words)
        for e in (replace(e, lag=0.0) for e in events)
        if isinstance(e, messages.Tail | messages.Final)
    ]


@pytest.fixture(scope="module", params=["unjudged", "judged"])
def joint_model(tiny, request):
    letters = [[a + b] for a in testing.LETTERS[:12] for b in testing.LETTERS[:12]]
    beam = BeamConfig(piece_floor=-30.0, word_bonus=8.0)  # random weights are sure of nothing
    writer = WriterConfig(llm_weight=0.5, quiet_frames=2, rival_gap=20.0, sure=0.8)
    if request.param == "judged":
        writer = replace(writer, text_weight=1.0)
        tiny = replace(tiny, text=prefix_of(tiny))
    cfg = replace(tiny.cfg, beam=beam, writer=writer)
    return replace(tiny, cfg=cfg, lexicon=lexicon_of(letters))


@pytest.fixture(scope="module")
def speech():
    gen = torch.Generator().manual_seed(3)
    noise = torch.randn(16_000 * 5, generator=gen).numpy()
    level = torch.rand(25, generator=gen).repeat_interleave(3200).numpy()
    return (0.4 * noise * level).astype("float32")


def test_any_cut_equals_one_call(joint_model, speech):
    with Engine(joint_model, EngineConfig(n_slots=1)) as engine:
        whole = plain(engine.transcribe(speech, OFF))
        assert sum(len(e[1]) for e in whole if isinstance(e, tuple)) >= 5
        for size in (7, 4096):
            stream = engine.open(OFF)
            for at in itertools.chain(range(0, 700, size), range(700 - 700 % -size, 80_000, 4096)):
                stream.wait_for_room(1.0)
                end = min(at + size, 80_000) if at < 700 else at + 4096
                stream.feed(speech[at:end])
            stream.finish()
            assert plain(stream.events()) == whole


def test_a_row_is_alone(joint_model, speech):
    with Engine(joint_model, EngineConfig(n_slots=1)) as engine:
        alone = [plain(engine.transcribe(speech[i * 4000 :], OFF)) for i in range(3)]
    with Engine(joint_model, EngineConfig(n_slots=3)) as engine, ThreadPoolExecutor(3) as pool:
        together = pool.map(lambda i: plain(engine.transcribe(speech[i * 4000 :], OFF)), range(3))
        assert list(together) == alone


def test_a_writer_expects_what_it_writes_when_the_llm_agrees(vocabulary, lexicon):
    """The first word of a sentence with a capital, and as many words as are due."""
    heard = hearing(vocabulary, lexicon, frames(lexicon, "cat", "sat", gap=12, sure=0.999))
    joint = Joint(heard, 9, 0)
    assert text_of_picks(joint.expect(), vocabulary) == [" Cat", " sat"]
    assert write_all(joint, vocabulary, {" Cat": -0.5}) == [" Cat", " sat"]
    assert joint.expect() == []
    heard.beam.hear(frames(lexicon, "cat", gap=12, sure=0.999))
    assert text_of_picks(Joint(heard, 9, 0).expect(), vocabulary) == [" cat"]
    joint = Joint(heard, 9, 0)
    assert joint.goes_on(0.0)
    ids = joint.suggest()
    assert (
        vocabulary.decode(joint.pick(ids, [float(i == vocabulary.encode(".")[0]) for i in ids]))
        == "."
    )
    assert text_of_picks(joint.expect(), vocabulary) == [" Cat"]


def test_a_writer_expects_no_word_that_is_not_due(vocabulary, lexicon):
    heard = hearing(vocabulary, lexicon, frames(lexicon, "cat", "sat"))
    assert text_of_picks(Joint(heard, 9, n_delay=5).expect(), vocabulary) == [" Cat"]
    everything = Joint(heard, 9, n_delay=5, is_last=True).expect()
    assert text_of_picks(everything, vocabulary) == [" Cat", " sat"]
    assert Greedy(3).expect() == []


def text_of_picks(picks, vocabulary):
    return [vocabulary.decode(pick) for pick in picks]
