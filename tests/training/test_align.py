"""align.py: the best alignment, found by trying all of them."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_stream.errors import AudioFormatError, ConfigError, ModelError
from sparqle_stream.pieces import BLANK, greedy_path
from training import align
from training.align import BAD_ALIGNMENT, CTC_EARLY_FRAMES, align_words, viterbi, viterbi_rows
from training.corpus import Pack
from training.sources import Source, clips_of
from training.text import train_pieces


def random_posteriors(n_frames, n_pieces, seed):
    scores = 2.0 * np.random.default_rng(seed).standard_normal((n_frames, n_pieces))
    log_sum = np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return (scores - log_sum).astype(np.float32)


def collapse(path):
    return [piece for piece, _ in itertools.groupby(path) if piece != BLANK]


def best_path(log_probs, pieces):
    """Every path there is -> the best one that spells `pieces`, and its score a frame."""
    n_frames, n_pieces = log_probs.shape
    paths = [
        p for p in itertools.product(range(n_pieces), repeat=n_frames) if collapse(p) == pieces
    ]
    if not paths:
        return None, -np.inf
    scores = [sum(log_probs[t, piece] for t, piece in enumerate(p)) / n_frames for p in paths]
    return paths[int(np.argmax(scores))], max(scores)


def ends_of(path):
    """Last frame of every piece on a path."""
    ends, at = [], 0
    for piece, run in itertools.groupby(path):
        at += len(list(run))
        if piece != BLANK:
            ends.append(at - 1)
    return ends


@settings(max_examples=60, deadline=None)
@given(
    n_frames=st.integers(1, 6),
    pieces=st.lists(st.integers(1, 2), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_viterbi_equals_brute_force(n_frames, pieces, seed):
    """Repeats that need a blank between them, and texts that do not fit, included."""
    log_probs = random_posteriors(n_frames, 3, seed)
    path, expected = best_path(log_probs, pieces)
    ends, score = viterbi(log_probs, pieces)
    assert score == pytest.approx(expected, abs=1e-5)
    if path is not None:
        assert ends.tolist() == ends_of(path)


def test_a_long_text_is_traced_back_to_its_beginning():
    """More states than a byte can count: once the trace back overflowed past 63 pieces."""
    rng = np.random.default_rng(0)
    pieces = rng.integers(1, 9, 300).tolist()
    path = [piece for target in pieces for piece in (BLANK, target, target)]
    log_probs = np.full((len(path), 9), -5.0, np.float32)
    log_probs[range(len(path)), path] = -0.1
    ends, score = viterbi(log_probs, pieces)
    assert ends.tolist() == list(range(2, 900, 3))
    assert score == pytest.approx(-0.1, abs=1e-5)


def test_a_text_that_does_not_fit_has_no_score():
    log_probs = random_posteriors(3, 3, 0)
    assert viterbi(log_probs, [1, 2, 1, 2])[1] == -np.inf
    assert viterbi(log_probs, [1, 1, 1])[1] == -np.inf  # two blanks are missing
    assert viterbi(log_probs, [])[1] == -np.inf
    assert viterbi(log_probs[:0], [1])[1] == -np.inf


def test_rows_at_once_are_rows_alone():
    """Whatever the lengths of the texts beside it; no rows are no work."""
    gen = torch.Generator().manual_seed(2)
    log_probs = torch.randn(4, 30, 9, generator=gen).log_softmax(dim=-1)
    pieces = [[3, 3, 1], [5], list(range(1, 9)) * 2, []]
    for (ends, score), row, of_row in zip(
        viterbi_rows(log_probs, pieces), log_probs, pieces, strict=True
    ):
        alone, alone_score = viterbi(row.numpy(), of_row)
        assert ends.tolist() == alone.tolist()
        assert score == alone_score
    assert viterbi_rows(log_probs[:0], []) == []


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    book = ["the twenty one dogs sat on the mat", "one by one they went off exulting"]
    return train_pieces(book, 48, tmp_path_factory.mktemp("pieces") / "pieces.json")


def say(pieces, words, n_pieces):
    """[(word, frames of blank after it)] -> log-probs (T, V), last frame of every word."""
    path, ends = [BLANK], []
    for word, pause in words:
        for piece in pieces.encode(word):
            path += [piece] * 2 + [BLANK]  # the blank keeps repeated pieces apart
        ends.append(len(path) - 2)
        path += [BLANK] * pause
    sure = np.full((len(path), n_pieces), -9.0, np.float32)
    sure[range(len(path)), path] = -0.01
    return sure, ends


def test_words_end_where_they_were_said(pieces):
    log_probs, ends = say(pieces, [("the", 3), ("dogs", 0), ("twenty", 0), ("one", 7)], pieces.size)
    words, score = align_words(log_probs, "The dogs, twenty-one.", pieces)
    assert score > -0.1
    assert [w.text for w in words] == ["The", "dogs,", "twenty-one."]  # written as they were
    assert [w.end_frame for w in words] == [ends[i] + CTC_EARLY_FRAMES for i in (0, 1, 3)]
    heard = [piece for _, piece in greedy_path(torch.from_numpy(log_probs))]
    assert pieces.decode(heard) == "the dogs twenty one"


def test_signs_without_sound_end_with_the_word_before(pieces):
    log_probs, ends = say(pieces, [("the", 2), ("mat", 4)], pieces.size)
    words, _ = align_words(log_probs, "-- the — mat ...", pieces)
    assert [w.text for w in words] == ["--", "the", "—", "mat", "..."]
    the, mat = (end + CTC_EARLY_FRAMES for end in ends)
    assert [w.end_frame for w in words] == [0, the, the, mat, mat]


def test_no_word_ends_after_the_audio(pieces):
    log_probs, _ = say(pieces, [("the", 0), ("mat", 0)], pieces.size)
    words, _ = align_words(log_probs[:-1], "the mat", pieces)
    assert words[-1].end_frame == len(log_probs) - 2


def test_the_wrong_text_scores_worse(pieces):
    log_probs, _ = say(pieces, [("the", 3), ("dogs", 3), ("sat", 3)], pieces.size)
    right, wrong = (align_words(log_probs, t, pieces)[1] for t in ("the dogs sat", "off exulting"))
    assert right > -0.1 > BAD_ALIGNMENT > wrong


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def spelled(pieces, monkeypatch, tmp_path):
    """A pack of three recordings, and an ear that hears 'the dogs sat' in each of them."""
    from training import hearing
    from training.corpus import PackWriter

    log_probs, ends = say(pieces, [("the", 3), ("dogs", 3), ("sat", 3)], pieces.size)
    with PackWriter(tmp_path) as writer:
        for name, text in (("right", "The dogs sat."), ("wrong", "off exulting"), ("none", "")):
            facts = {"speaker": "s", "corpus": "c", "licence": "l"}
            writer.add(np.zeros(640 * len(log_probs), np.int16), id=name, text=text, **facts)
    monkeypatch.setattr(hearing, "load_ear", lambda *_: (None, None))
    heard = torch.from_numpy(log_probs)
    monkeypatch.setattr(
        hearing, "posteriors", lambda e, h, pcm, chunk: ((i, heard) for i in range(len(pcm)))
    )
    pieces.tokenizer.save(str(tmp_path / "pieces.json"))
    return tmp_path, ends


def run_align(monkeypatch, folder, *more):
    files = ["--ear", "ear", "--pieces", str(folder / "pieces.json")]
    monkeypatch.setattr(sys, "argv", ["align", str(folder), *files, *more])
    align.main()
    rows = [json.loads(line) for line in (folder / align.WORDS).read_text().splitlines()]
    return {row["id"]: row for row in rows}


def test_word_ends_are_written_beside_the_pack(spelled, monkeypatch, capsys):
    folder, ends = spelled
    rows = run_align(monkeypatch, folder)
    assert rows.keys() == {"right", "wrong"}  # nothing is known of the third
    expected = [(end + CTC_EARLY_FRAMES + 1) * 40 for end in ends]
    assert rows["right"]["words"] == [
        [text, end] for text, end in zip(["The", "dogs", "sat."], expected, strict=True)
    ]
    assert (rows["right"]["is_poor"], rows["wrong"]["is_poor"]) == (False, True)
    assert rows["right"]["score"] > -0.1 > BAD_ALIGNMENT > rows["wrong"]["score"]
    assert "2 recordings, 1 of them poor" in capsys.readouterr().out


def test_a_source_leaves_out_what_is_poor(spelled, monkeypatch):
    folder, _ = spelled
    source = Source(str(folder), skip_poor=True)
    with pytest.raises(ConfigError, match=r"no words.jsonl"):
        clips_of(source, Pack(folder))
    run_align(monkeypatch, folder)
    assert [clip.id for clip in clips_of(source, Pack(folder))] == ["right"]
    assert len(clips_of(Source(str(folder)), Pack(folder))) == 2


def test_aligning_goes_on_where_it_stopped(spelled, monkeypatch):
    folder, _ = spelled
    whole = run_align(monkeypatch, folder)
    first = (folder / align.WORDS).read_text().splitlines()[0]
    (folder / align.WORDS).write_text(first + "\n")
    assert run_align(monkeypatch, folder, "--resume") == whole


def test_a_wrong_option_leaves_what_was_aligned(spelled, monkeypatch, capsys):
    """The file was emptied first, and the ear looked for then: hours of work for a typing error."""
    from training import hearing

    folder, _ = spelled
    run_align(monkeypatch, folder)
    written = (folder / align.WORDS).read_text()

    def load_ear(path, n_pieces, device):
        raise ModelError(f"cannot read {path}", hint="")

    monkeypatch.setattr(hearing, "load_ear", load_ear)
    with pytest.raises(SystemExit, match="2"):
        run_align(monkeypatch, folder)
    assert "cannot read ear" in capsys.readouterr().err
    assert (folder / align.WORDS).read_text() == written


def write_wav(path, n):
    import wave

    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(np.full(n, 8192, np.int16).tobytes())


def test_half_a_line_of_a_killed_run_is_dropped(spelled, monkeypatch, capsys):
    folder, _ = spelled
    whole = run_align(monkeypatch, folder)
    lines = (folder / align.WORDS).read_text().splitlines()
    (folder / align.WORDS).write_text(lines[0] + "\n" + lines[1][:15])
    assert align.poor_ids(folder) == {row["id"] for row in [json.loads(lines[0])] if row["is_poor"]}
    assert run_align(monkeypatch, folder, "--resume") == whole
    (folder / align.WORDS).write_text(lines[0][:15] + "\n" + lines[1] + "\n")
    with pytest.raises(SystemExit, match="2"):
        run_align(monkeypatch, folder, "--resume")
    assert "error: line 1 of" in capsys.readouterr().err


def test_a_damaged_file_leaves_the_others_their_transcripts(tmp_path, monkeypatch):
    """Also where it is the first of those that are left, or of those that are heard at once."""
    from training import hearing

    def heard(encoder, head, pcm, chunk):
        return ((i, torch.zeros(len(x), 1)) for i, x in enumerate(pcm))

    monkeypatch.setattr(hearing, "posteriors", heard)
    seen = []
    monkeypatch.setattr(
        align, "align_words", lambda x, text, _: seen.append((text, len(x))) or ([], -0.1)
    )
    monkeypatch.setattr(align, "HEARD_AT_ONCE", 2)
    rows = [{"audio": f"{i}.wav", "text": str(1600 + i)} for i in range(5)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(5):
        write_wav(tmp_path / f"{i}.wav", 1600 + i)
    for damaged in "12":
        (tmp_path / f"{damaged}.wav").write_text("no sound")
    todo, rest = align.transcripts(tmp_path), ((None, None), None, 0, -1.2)
    names = [row["id"] for row in align.align(tmp_path, todo, *rest)]
    assert names == ["0", "3", "4"]
    assert seen == [(str(1600 + i), 1600 + i) for i in (0, 3, 4)]
    with pytest.raises(AudioFormatError):
        list(align.align(tmp_path, todo[1:], *rest))
    left = align.align(tmp_path, todo[1:], *rest, is_any=True)
    assert [row["id"] for row in left] == ["3", "4"]


def test_a_manifest_is_aligned_too(tmp_path):
    """Transcripts and PCM of a folder with manifest.jsonl, nothing decoded before it is needed."""
    write_wav(tmp_path / "a.wav", 1600)
    rows = [{"id": "a", "audio": "a.wav", "text": "so"}, {"id": "b", "audio": "no", "text": ""}]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    ((name, text, handle),) = align.transcripts(tmp_path)
    assert (name, text) == ("a", "so")
    ((one, pcm),) = align.recordings(tmp_path, [(name, text, handle)])
    assert one == (name, text, handle)
    np.testing.assert_array_equal(pcm, np.full(1600, 0.25, np.float32))
