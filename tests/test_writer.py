"""Writers: what LLM and CTC agree on is written, as far as it is due; and the contract holds."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from sparqle_stream import messages, testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig, WriterConfig
from sparqle_stream.ctc_prefix import CtcPrefix, PieceTable
from sparqle_stream.engine import Engine
from sparqle_stream.errors import ConfigError
from sparqle_stream.writer import Heard, Joint, Spelling

CFG = WriterConfig(ctc_weight=1.0)
OFF = StreamOptions(vad=VadConfig(kind="off"))


class Vocabulary:
    """Tokens of a fixed list; other text is spelled in letters, which come first."""

    words = (" cat", " dog", " sat", " c", "at", ".", ",", " 7", "\n", "s")

    def __init__(self) -> None:
        self.tokens = [*testing.LETTERS, " ", *self.words]

    def encode(self, text: str) -> list[int]:
        if text in self.tokens:
            return [self.tokens.index(text)]
        return [self.tokens.index(x) for x in text if x in self.tokens]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.tokens[i] for i in ids)

    def ids(self, *texts: str) -> list[int]:
        return [self.tokens.index(text) for text in texts]


@pytest.fixture
def vocabulary():
    return Vocabulary()


def frames(*words: str, gap: int = 4, sure: float = 0.9) -> torch.Tensor:
    """Log-probabilities (T, V) of words, a letter a frame; what is left goes to all pieces."""
    pieces = PieceTable.of(testing.tiny_pieces()).texts
    letters = [x for word in words for x in [" " + word[0], *word[1:], *[""] * gap]]
    probs = torch.full((len(letters), len(pieces)), (1 - sure) / (len(pieces) - 1))
    for t, letter in enumerate(letters):
        probs[t, pieces.index(letter)] = sure
    return probs.log()


def hearing(vocabulary, log_probs, cfg=CFG) -> Heard:
    prefix = CtcPrefix(PieceTable.of(testing.tiny_pieces()))
    prefix.hear(log_probs)
    return Heard(cfg, vocabulary, prefix)


def write_all(joint: Joint, vocabulary, offers: dict[str, float], stop: float = 0.0) -> list[str]:
    """What a writer writes when the LLM always offers the same tokens at the same odds."""
    out = []
    while joint.goes_on(stop):
        ids = vocabulary.ids(*offers)
        log_probs = list(offers.values())
        for token in joint.suggest():
            if token not in ids:
                ids.append(token)
                log_probs.append(-12.0)
        picked = joint.pick(ids, log_probs)
        if picked is None:
            break
        out.append(vocabulary.decode([picked]))
    return out


@pytest.mark.parametrize(
    ("texts", "letters"),
    [
        ([" O'Neil", "'s", " dog", "s'", " x"], [" o'neil", "'s", " dog", "s", " x"]),
        ([" Well", "-", "known", " -- so"], [" well", "", " known", " so"]),
        ([" yes", ".", "No"], [" yes", "", None]),
        (["No"], [None]),
        ([" “"], [None]),
        ([" '", "tis"], ["", " tis"]),
        ([" 7"], [None]),
        (["\n"], [None]),
    ],
)
def test_spelling(texts, letters):
    at = Spelling()
    for text, expected in zip(texts, letters, strict=False):
        said = at.spell(text)
        if expected is None:
            assert said is None
            return
        assert said is not None
        assert said[0] == expected
        at = said[1]


def test_what_was_heard_outweighs_what_the_llm_expects(vocabulary):
    joint = Joint(hearing(vocabulary, frames("cat", "sat")), n_most=9, n_delay=0)
    offers = {" dog": -0.1, " sat": -3.0, " cat": -5.0, ".": -6.0}
    assert write_all(joint, vocabulary, offers) == [" cat", " sat"]


def test_the_llm_decides_where_hearing_is_unsure(vocabulary):
    unsure = frames("cat").exp()
    unsure[0], unsure[1], unsure[2] = ((unsure[i] + frames("dog").exp()[i]) / 2 for i in range(3))
    for best, other in ((" cat", " dog"), (" dog", " cat")):
        joint = Joint(hearing(vocabulary, unsure.log()), n_most=9, n_delay=0)
        assert write_all(joint, vocabulary, {best: -0.5, other: -2.0}) == [best]


def test_a_word_waits_for_its_delay(vocabulary):
    """Heard words end at frames 3, 10; at frame 14 with a delay of 5 only the first is due."""
    heard = hearing(vocabulary, frames("cat", "sat"))
    offers = {" cat": -1.0, " sat": -1.0}
    assert write_all(Joint(heard, 9, n_delay=5), vocabulary, offers) == [" cat"]
    assert write_all(Joint(heard, 9, n_delay=5), vocabulary, offers) == []
    heard.prefix.hear(frames("dog")[3:])  # a second of blanks
    assert write_all(Joint(heard, 9, n_delay=5), vocabulary, offers) == [" sat"]


def test_an_open_word_is_finished_letter_by_letter(vocabulary):
    joint = Joint(hearing(vocabulary, frames("cat", sure=0.9999)), n_most=9, n_delay=0)
    assert write_all(joint, vocabulary, {" c": -0.1, "s": -2.0, ".": -4.0}) == [" c", "at"]


def test_letters_wait_until_they_are_heard(vocabulary):
    """An open word ends when another is heard or silence is; then punctuation may follow."""
    heard = hearing(vocabulary, frames("cat", gap=1))
    sure_to_go_on, offers = -40.0, {" dog": -0.1, ".": -1.0, "s": -1.0}
    assert write_all(Joint(heard, 9, 0), vocabulary, offers, stop=sure_to_go_on) == [" cat"]
    assert not heard.is_between_words()
    heard.prefix.hear(frames("a", gap=CFG.quiet_frames)[1:])
    assert heard.is_between_words()
    assert write_all(Joint(heard, 9, 0), vocabulary, offers, stop=40.0) == []
    assert write_all(Joint(heard, 9, 0), vocabulary, offers, stop=sure_to_go_on) == ["."]
    assert write_all(Joint(heard, 9, 0), vocabulary, offers, stop=sure_to_go_on) == []


def test_a_piece_may_be_written_in_parts(vocabulary):
    """Two letters in one piece, of which a token has the first: the other is still to come."""
    table = PieceTable((*PieceTable.of(testing.tiny_pieces()).texts, "at"))
    probs = torch.full((8, len(table.texts)), 1e-4)
    for t, piece in enumerate([" c", "at", "", "", "", "", "", ""]):
        probs[t, table.texts.index(piece)] = 1.0
    prefix = CtcPrefix(table)
    prefix.hear(probs.log())
    heard = Heard(CFG, vocabulary, prefix)
    prefix.write(" ca")
    heard.spelling = Spelling(is_broken=False)
    assert prefix.left == "t"
    assert heard.what_next().going == "t"
    prefix.write("t")
    assert prefix.left == ""
    assert heard.what_next().going == ""


def test_no_more_than_allowed_and_nothing_that_cannot_be_said(vocabulary):
    heard = hearing(vocabulary, frames("cat", "sat", "cat"))
    offers = {" 7": -0.01, "\n": -0.01, " cat": -3.0, " sat": -3.0}
    assert write_all(Joint(heard, 2, 0), vocabulary, offers) == [" cat", " sat"]
    assert write_all(Joint(heard, 2, 0), vocabulary, offers) == [" cat"]


def test_a_letter_is_not_written_three_times_in_a_row(vocabulary):
    heard = hearing(vocabulary, frames("sassy"))
    heard.prefix.write(" sass")
    heard.spelling = Spelling(is_broken=False)
    joint = Joint(heard, 9, 0)
    assert joint.pick(vocabulary.ids("s", "y"), [-0.01, -9.0]) == vocabulary.ids("y")[0]


def test_where_nothing_fits_the_text_ends_and_goes_on_later(vocabulary):
    heard = hearing(vocabulary, frames("cat", "sat"))
    joint = Joint(heard, 9, 0)
    assert joint.pick(vocabulary.ids(" 7", "."), [-0.1, -0.2]) is None
    assert heard.what_next().word == " sat"
    assert write_all(Joint(heard, 9, 0), vocabulary, {" sat": -1.0}) == [" sat"]


def test_a_weight_below_zero_is_refused():
    with pytest.raises(ConfigError, match="ctc_weight"):
        WriterConfig(ctc_weight=-1.0)


# --- the contract, with a whole engine ------------------------------------------------------------


def plain(events) -> list[object]:
    return [
        e if isinstance(e, messages.Tail) else (e.text, e.words)
        for e in (replace(e, lag=0.0) for e in events)
        if isinstance(e, messages.Tail | messages.Final)
    ]


@pytest.fixture(scope="module")
def joint_model(tiny):
    return replace(tiny, cfg=replace(tiny.cfg, writer=WriterConfig(ctc_weight=0.5)))


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
