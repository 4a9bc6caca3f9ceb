"""The word beam against an enumeration of every path, and its contract: parts, commits, bounds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from sparqle_stream.config import BeamConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.word_beam import MOST_KEPT, WordBeam
from tests.lexicons import lexicon_of

WIDE = BeamConfig(
    size=4096, width=1e9, piece_floor=-1e9, n_spelled=0, word_bonus=0.3, blank_cost=0.0
)
WORDS = ("a", "ab", "b", "ba")


@pytest.fixture(scope="module")
def lexicon():
    return lexicon_of([["a", "ba"], ["a", "ba"], ["ba", "ab", "b"]])


def random_frames(n_frames: int, lexicon, seed: int = 0, sharp: float = 2.0) -> np.ndarray:
    """Log-probabilities (T, V) on blank and the letters that the words need."""
    generator = np.random.default_rng(seed)
    used = [0, *(i for i, text in enumerate(lexicon.pieces) if text in (" a", " b", "a", "b"))]
    scores = np.full((n_frames, len(lexicon.pieces)), -40.0)
    scores[:, used] = sharp * generator.standard_normal((n_frames, len(used)))
    norm = np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return (scores - norm).astype(np.float32)


def every_text(log_probs: np.ndarray, lexicon) -> dict[str, float]:
    """Text -> log-probability, summed over all paths of likely pieces."""
    likely = [i for i in range(log_probs.shape[1]) if log_probs[:, i].max() > -30]
    out: dict[str, float] = {}
    for path in itertools.product(likely, repeat=len(log_probs)):
        chance = float(sum(log_probs[t, piece] for t, piece in enumerate(path)))
        text = "".join(lexicon.pieces[piece] for piece, _ in itertools.groupby(path))
        out[text] = float(np.logaddexp(out.get(text, -math.inf), chance))
    return out


def scored(texts: dict[str, float], lexicon, cfg: BeamConfig) -> dict[tuple[str, ...], float]:
    """Texts of lexicon words only, with their n-gram scores; the last word is over."""
    out = {}
    for text, mass in texts.items():
        words = tuple(text.split())
        if not text.startswith(" ") or any(word not in lexicon.words for word in words):
            continue
        context = (0, 0)
        for word in words:
            i = lexicon.words.index(word)
            mass += cfg.lm_weight * lexicon.log_prob(context, i) + cfg.word_bonus
            context = (context[1], i)
        out[words] = mass
    return out


@pytest.mark.parametrize("seed", range(4))
def test_readings_are_sums_over_all_paths(lexicon, seed):
    log_probs = random_frames(5, lexicon, seed)
    beam = WordBeam(lexicon, WIDE)
    beam.hear(log_probs)
    expected = scored(every_text(log_probs, lexicon), lexicon, WIDE)
    found = dict(beam.readings())
    assert found.keys() - {()} == expected.keys()
    for words, score in expected.items():
        # an open word's bonus is paid when it is over
        assert found[words] == pytest.approx(score, abs=1e-4), words


def test_a_candidate_is_the_sum_of_the_readings_that_begin_with_it(lexicon):
    """With their open words' n-gram scores, which say more of a word than the tree above it."""
    beam = WordBeam(lexicon, WIDE)
    beam.hear(random_frames(6, lexicon, seed=5))
    readings = beam.readings()
    found, everything, nothing = beam.candidates()
    assert {c.word.text for c in found} == set(WORDS)
    for candidate in found:
        begun = [score for words, score in readings if words[:1] == (candidate.word.text,)]
        assert candidate.score == pytest.approx(np.logaddexp.reduce(begun), abs=1e-6)
    assert everything == pytest.approx(np.logaddexp.reduce([s for _, s in readings]), abs=1e-6)
    assert nothing == pytest.approx(dict(readings)[()], abs=1e-6)


def test_a_cost_of_blanks_is_as_if_they_had_been_heard_less(lexicon):
    log_probs = random_frames(6, lexicon, seed=4)
    costly, free = WordBeam(lexicon, replace(WIDE, blank_cost=1.5)), WordBeam(lexicon, WIDE)
    costly.hear(log_probs)
    log_probs[:, 0] -= 1.5
    free.hear(log_probs - np.logaddexp.reduce(log_probs, axis=1, keepdims=True))
    for (words, score), (others, other) in zip(costly.readings(), free.readings(), strict=True):
        assert words == others
        assert score == pytest.approx(other, abs=1e-5)


def test_hearing_in_parts_is_hearing_at_once(lexicon):
    log_probs = random_frames(40, lexicon, seed=3)
    whole, parts = (WordBeam(lexicon, BeamConfig()) for _ in range(2))
    whole.hear(log_probs)
    for part in np.split(log_probs, [1, 8, 9, 30]):
        parts.hear(part)
    assert parts.readings() == whole.readings()
    assert parts.candidates() == whole.candidates()


def spell(lexicon, *pieces: str, sure: float = 0.9) -> np.ndarray:
    """Frames of pieces, "" for blank."""
    probs = np.full((len(pieces), len(lexicon.pieces)), (1 - sure) / (len(lexicon.pieces) - 1))
    for t, piece in enumerate(pieces):
        probs[t, lexicon.pieces.index(piece)] = sure
    return np.log(probs).astype(np.float32)


def test_words_come_with_their_times(lexicon):
    beam = WordBeam(lexicon, BeamConfig())
    beam.hear(spell(lexicon, "", " b", "", "a", "", " a", "", ""))
    first = beam.candidates()[0][0]
    assert (first.word.text, first.word.start, first.word.end) == ("ba", 1, 4)
    assert first.is_closed
    beam.commit("ba")
    second = beam.candidates()[0][0]
    assert (second.word.text, second.word.start, second.word.end) == ("a", 5, 6)
    assert not second.is_closed


def test_what_is_committed_stays_and_conditions_what_follows(lexicon):
    log_probs = random_frames(6, lexicon, seed=1)
    beam = WordBeam(lexicon, WIDE)
    beam.hear(log_probs)
    expected = scored(every_text(log_probs, lexicon), lexicon, WIDE)
    chosen = beam.candidates()[0][1].word.text  # the second best
    beam.commit(chosen)
    for words, score in beam.readings():
        assert score == pytest.approx(expected[chosen, *words], abs=1e-4)
    with pytest.raises(ValueError, match="no reading begins with"):
        beam.commit("nothing")


def test_a_word_of_no_lexicon_is_spelled(lexicon):
    cfg = replace(BeamConfig(), spell_cost=1.0, letter_cost=0.1, spell_floor=-1.0)
    beam = WordBeam(lexicon, cfg)
    beam.hear(spell(lexicon, " b", "", "c", "", "a", "", " a", "", sure=0.999))
    assert beam.candidates()[0][0].word.text == "bca"
    beam.commit("bca")
    assert beam.candidates()[0][0].word.text == "a"
    never = WordBeam(lexicon, replace(cfg, n_spelled=0))
    never.hear(spell(lexicon, " b", "", "c", "", "a", "", " a", "", sure=0.999))
    assert all(c.word.text in WORDS for c in never.candidates()[0])


@pytest.mark.parametrize("is_committed", [False, True])
def test_where_no_word_can_end_one_breaks_off(is_committed):
    """'ca' begins a word that is not gone on with: what is said next must not be lost with it."""
    lexicon = lexicon_of([["cat", "sat"], ["sat", "cat"]])
    cfg = replace(BeamConfig(), spell_floor=-1e-9)  # nothing is spelled from its beginning on
    heard = spell(
        lexicon, " s", "a", "t", " c", "", "a", "", "", " s", "", "a", "t", "", sure=0.999
    )
    beam, never = WordBeam(lexicon, cfg), WordBeam(lexicon, replace(cfg, n_spelled=0))
    for one in (beam, never):
        one.hear(heard[:7])
        if is_committed:
            one.commit("sat")
        one.hear(heard[7:])
    words = ("sat", "ca", "sat")
    assert beam.readings()[0][0] == words[is_committed:]
    assert not never.readings() or words[is_committed:] not in dict(never.readings())


def test_silence_has_no_words(lexicon):
    beam = WordBeam(lexicon, BeamConfig())
    beam.hear(spell(lexicon, *[""] * 20, sure=0.999))
    found, _, nothing = beam.candidates()
    assert not found or nothing > found[0].score
    assert not beam.is_open


@pytest.mark.parametrize("is_committed", [True, False])
def test_hours_stay_small(lexicon, is_committed):
    """What is kept is bounded, however much is heard, whether or not words are ever taken."""
    cfg = BeamConfig(size=16, spell_floor=-9.0)
    beam = WordBeam(lexicon, cfg)
    for i in range(120):
        beam.hear(random_frames(8, lexicon, seed=i, sharp=4.0))
        found = beam.candidates()[0]
        if is_committed and found and beam.n_frames - found[0].word.end > 6:
            beam.commit(found[0].word.text)
        assert beam.n_hypotheses <= cfg.size
        assert beam.n_kept <= (MOST_KEPT + 8) * cfg.size
    assert np.isfinite(beam.candidates()[1])


def test_a_beam_needs_a_size():
    with pytest.raises(ConfigError, match="a size and a width"):
        BeamConfig(size=0)


def test_a_course_tells_what_candidates_will_say(lexicon):
    """Words of the best reading with their times and masses, as if they were committed in turn."""
    for seed in range(4):
        beam = WordBeam(lexicon, WIDE)
        beam.hear(random_frames(8, lexicon, seed))
        course, everything = beam.course()
        assert everything == pytest.approx(beam.candidates()[1], abs=1e-6)
        for said in course:
            found = {c.word.text: c for c in beam.candidates()[0]}
            now = found[said.word.text]
            assert (now.word.end, now.is_closed) == (said.word.end, said.is_closed)
            assert now.score == pytest.approx(said.score, abs=1e-6)
            beam.commit(said.word.text)
