"""data.py: streams of clips, distortions within their limits, the same again from the same seed."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparqle_stream.errors import ConfigError
from training import data
from training.corpus import Pack, PackWriter
from training.data import AugmentConfig, Augmenter, Stream, StreamSampler, Utterance

RATE_HZ = 16_000
CLEAN = AugmentConfig(speed=0, noise=0, telephone=0, room=0, gain_low_db=0, gain_high_db=0)
SECONDS = [0.5, 0.8, 1.1, 1.7, 2.2]


def write_pack(folder, lengths, seed=0, text="clip"):
    rng = np.random.default_rng(seed)
    with PackWriter(folder) as writer:
        for i, n in enumerate(lengths):
            pcm = rng.integers(-8000, 8000, n, dtype=np.int16)
            pcm[[0, -1]] = 8000  # its borders can be found again
            facts = {"speaker": "s", "corpus": "c", "licence": "l"}
            writer.add(pcm, id=f"{folder.name}-{i}", text=f"{text} {i}", **facts)
    return Pack(folder)


@pytest.fixture
def pack(tmp_path):
    return write_pack(tmp_path / "speech", [round(s * RATE_HZ) for s in SECONDS])


@pytest.fixture
def noise(tmp_path):
    return write_pack(tmp_path / "noise", [2 * RATE_HZ, 50 * RATE_HZ], seed=1)


def sampler(pack, seed=0, seconds=6.0, cfg=CLEAN, noise=None):
    augment = Augmenter(cfg, noise, random.Random(seed))
    return StreamSampler([(pack, pack.clips, 1.0)], augment, seconds)


def test_streams_hold_whole_clips_and_know_where_they_lie(pack):
    by_id = {clip.id: clip for clip in pack.clips}
    made = sampler(pack)
    for _ in range(20):
        stream = made.stream()
        assert len(stream.clean) == len(stream.noisy) == 6 * RATE_HZ
        assert stream.utterances
        silent, end = np.ones(len(stream.clean), bool), 0
        for said in stream.utterances:
            assert said.start >= end + (800 if end == 0 else 160)  # 50 ms before, 10 ms between
            np.testing.assert_array_equal(
                stream.clean[said.start : said.end], pack.pcm(by_id[said.clip_id])
            )
            assert said.text == by_id[said.clip_id].text
            silent[said.start : said.end] = False
            end = said.end
        assert end <= len(stream.clean)
        assert not stream.clean[silent].any()


def test_every_clip_is_drawn_once_a_pass(pack):
    queue = data.Queue(pack.clips, random.Random(0))
    for _ in range(4):
        assert sorted(queue.draw() for _ in pack.clips) == list(range(len(pack.clips)))


def test_what_no_longer_fits_comes_again(tmp_path):
    """Long clips beside short ones: none is lost for this pass, and streams are full."""
    mixed = write_pack(tmp_path / "mixed", [5 * RATE_HZ] * 6 + [RATE_HZ // 2] * 40)
    made = sampler(mixed, seconds=6.0)
    streams = [made.stream() for _ in range(8)]
    heard = [said.clip_id for stream in streams for said in stream.utterances]
    assert sum(len(stream.utterances) > 1 for stream in streams) >= 6
    long = [clip.id for clip in mixed.clips if clip.seconds > 1]
    assert len(set(heard) & set(long)) == min(6, sum(clip in long for clip in heard))


def test_weights_choose_the_source(pack, noise):
    augment = Augmenter(CLEAN, None, random.Random(0))
    made = StreamSampler([(pack, pack.clips, 3.0), (noise, noise.clips, 1.0)], augment, 60.0)
    from_pack = sum(made._source(made.weights) == 0 for _ in range(2000))
    assert from_pack / 2000 == pytest.approx(0.75, abs=0.05)  # five standard deviations


@pytest.mark.parametrize("lengths_s", [(), (2.0, 3.0)])
def test_clips_that_are_too_long_do_not_hold_up_their_source(tmp_path, lengths_s):
    """Once they were put back for ever: from the second pass on their source was never heard."""
    mixed = write_pack(tmp_path / "mixed", [RATE_HZ] * 4 + [4 * RATE_HZ] * 6)
    plain = write_pack(tmp_path / "plain", [RATE_HZ] * 5)
    sources = [(one, one.clips, 0.5) for one in (mixed, plain)]
    augment = Augmenter(CLEAN, None, random.Random(0))
    made, seconds = StreamSampler(sources, augment, 3.0, 0.0, lengths_s), {"mixed": 0, "plain": 0}
    for _ in range(200):
        for said in (u for stream in made.batch(1, lengths_s) for u in stream.utterances):
            seconds[said.clip_id.partition("-")[0]] += said.end - said.start
    assert seconds["mixed"] / sum(seconds.values()) == pytest.approx(0.5, abs=0.08)


def test_a_clip_without_room_in_this_stream_does_not_end_the_pass(tmp_path):
    """All that is left of the pass was tried: the next one begins, the long clip has its turn."""
    mixed = write_pack(tmp_path / "mixed", [4 * RATE_HZ, RATE_HZ, RATE_HZ])
    made = sampler(mixed, seconds=4.5)
    (queue,) = made._queues_of(4.5)
    queue._left = [0]
    clip, _ = made._fitting([queue], 2 * RATE_HZ, 2)
    assert clip.seconds == 1.0
    queue.next_stream()
    assert sorted(queue.draw() for _ in range(2)) == [0, 2 if clip is mixed.clips[1] else 1]


def test_each_clip_is_heard_about_as_often_as_others(tmp_path):
    mixed = write_pack(tmp_path / "mixed", [round(s * RATE_HZ) for s in (0.3, 0.5, 0.9, 1.8, 2.9)])
    made, heard = sampler(mixed, seconds=3.0), dict.fromkeys((c.id for c in mixed.clips), 0)
    for _ in range(150):
        for said in made.stream().utterances:
            heard[said.clip_id] += 1
    assert min(heard.values()) > 0.6 * max(heard.values())


def test_a_clip_as_long_as_the_stream_has_a_short_pause_before_it(tmp_path):
    long = write_pack(tmp_path / "long", [round(2.94 * RATE_HZ)])
    for stream in sampler(long, seconds=3.0).batch(5):
        (said,) = stream.utterances
        assert 800 <= said.start <= 0.06 * RATE_HZ


def test_texts_are_those_of_sources_that_have_some(tmp_path, pack):
    silent = write_pack(tmp_path / "silent", [RATE_HZ], text="")
    untold = [replace(clip, text="") for clip in silent.clips]
    augment = Augmenter(CLEAN, None, random.Random(0))
    made = StreamSampler([(silent, untold, 9.0), (pack, pack.clips, 1.0)], augment, 3.0)
    assert set(made.texts(40)) == {clip.text for clip in pack.clips}
    nobody = StreamSampler([(silent, untold, 1.0)], augment, 3.0)
    with pytest.raises(ConfigError, match="no source has a transcript"):  # it hung
        nobody.texts(5)


def test_the_same_seed_gives_the_same_batches(pack, noise):
    cfg = AugmentConfig(speed=1.0, noise=1.0, telephone=1.0, room=1.0)
    first, again, other = (sampler(pack, seed, cfg=cfg, noise=noise).batch(2) for seed in (5, 5, 6))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a.noisy, b.noisy)
        assert a.utterances == b.utterances
        assert not np.array_equal(a.noisy, c.noisy)


def test_a_source_without_a_clip_that_fits_is_refused(pack):
    """Drawing for ever from clips that are all too long would hang the run without a word."""
    with pytest.raises(ConfigError, match=r"no clip of .*speech fits into a stream of 0.4 s"):
        sampler(pack, seconds=0.4)


def test_batches_of_several_lengths_hold_the_same_audio(pack):
    """12 s in all: 4 streams of 3 s, 2 of 6 s or 1 of 12 s, each full of whole clips."""
    made, seen = sampler(pack, seconds=6.0), set()
    for _ in range(30):
        batch = made.batch(2, (3.0, 6.0, 12.0))
        (n,) = {len(stream.clean) for stream in batch}
        assert len(batch) * n == 12 * RATE_HZ
        assert all(u.end <= n for stream in batch for u in stream.utterances)
        assert all(stream.utterances for stream in batch)
        seen.add(n // RATE_HZ)
    assert seen == {3, 6, 12}


def test_a_length_that_holds_no_clip_is_refused(pack):
    with pytest.raises(ConfigError, match=r"stream of 0.4 s"):
        sampler(pack).batch(2, (0.4,))


def test_a_stream_is_transcribed_when_all_of_it_is():
    pcm = np.zeros(1, np.float32)
    known, unknown = Utterance(0, 1, "so", "a"), Utterance(0, 1, "", "b")
    said = [[known, known], [], [known, unknown]]  # nothing is said in noise
    batch = data.side_by_side([Stream(pcm, pcm, row) for row in said], with_clean=False)
    assert batch.transcribed() == [0, 1]


# --- distortions ---------------------------------------------------------------------------------


def tone(seconds=2.0, hz=440.0, level=0.1):
    t = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return (level * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def distort(cfg, pcm, seed=0, noise=None):
    return Augmenter(cfg, noise, random.Random(seed)).distort(pcm)


@pytest.mark.parametrize("seed", range(5))
def test_everything_at_once_stays_in_range(noise, seed):
    cfg = AugmentConfig(noise=1.0, telephone=1.0, room=1.0, gain_low_db=20, gain_high_db=40)
    out = distort(cfg, tone(), seed, noise)
    assert out.dtype == np.float32
    assert len(out) == 2 * RATE_HZ
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= 1.0


def test_gains_lie_where_they_should():
    """Half of the streams anywhere in the range, the other half near full level."""
    cfg = replace(CLEAN, gain_low_db=-26.0, gain_high_db=8.0)
    pcm = tone(0.1)
    gains = [
        20 * np.log10(np.abs(distort(cfg, pcm, seed)).max() / np.abs(pcm).max())
        for seed in range(400)
    ]
    assert -26.0 <= min(gains) < -24.0
    assert 7.5 < max(gains) <= 8.0 + 1e-4
    assert np.mean(np.array(gains) > -6.0) == pytest.approx(0.5 + 0.5 * 14 / 34, abs=0.1)


@pytest.mark.parametrize("snr_db", [3.0, 20.0])
def test_noise_has_the_level_that_was_drawn(noise, snr_db):
    cfg = replace(CLEAN, noise=1.0, snr_low_db=snr_db, snr_high_db=snr_db)
    pcm = tone(3.0)
    out = distort(cfg, pcm, 3, noise)
    kept = (out @ pcm) / (pcm @ pcm) * pcm  # at the gain that was drawn
    snr = 10 * np.log10(np.sum(kept**2) / np.sum((out - kept) ** 2))
    assert snr == pytest.approx(snr_db, abs=0.2)


def test_silence_takes_noise_without_dividing_by_zero(noise):
    out = distort(replace(CLEAN, noise=1.0), np.zeros(RATE_HZ, np.float32), 0, noise)
    assert np.isfinite(out).all()


def test_the_telephone_ends_at_4_khz():
    low, high = (distort(replace(CLEAN, telephone=1.0), tone(hz=hz)) for hz in (1000, 6000))
    middle = slice(RATE_HZ // 4, -RATE_HZ // 4)
    assert np.std(low[middle]) == pytest.approx(np.std(tone()), rel=0.02)
    assert np.std(high[middle]) < 0.01 * np.std(tone())


def test_a_room_is_causal_and_keeps_the_direct_sound():
    pcm = np.zeros(RATE_HZ, np.float32)
    pcm[4000] = 0.5
    out = distort(replace(CLEAN, room=1.0), pcm)
    assert np.abs(out[:4000]).max() < 1e-6
    assert out[4000] == pytest.approx(0.5, abs=0.1)
    tail = np.sum(out[4001:] ** 2) / 0.25
    assert 0.005 < tail < 0.3


def test_speed_changes_length_and_pitch_together():
    augment = Augmenter(replace(CLEAN, speed=1.0), None, random.Random(2))
    pcm = tone(2.0, hz=1000.0)
    out = augment.speed(pcm)
    ratio = len(out) / len(pcm)
    assert 1 / 1.15 < ratio < 1 / 0.87
    assert abs(ratio - 1) > 0.01
    peak_hz = np.abs(np.fft.rfft(out)).argmax() * RATE_HZ / len(out)
    assert peak_hz == pytest.approx(1000.0 / ratio, rel=0.01)


# --- batches -------------------------------------------------------------------------------------


def test_rows_are_padded_to_whole_chunks_of_any_size():
    """1280 ms is a multiple of every chunk that training draws."""
    rows = data.stack([np.ones(n, np.float32) for n in (5, 20_481)])
    assert rows.shape == (2, 2 * 20_480)
    assert rows.sum(dim=1).tolist() == [5, 20_481]


def test_a_batch_is_what_the_engine_hears_in_16_bits():
    clean, noisy = np.full(5, 0.5, np.float32), np.full(5, -1.0, np.float32)
    streams = [Stream(clean, noisy, []), Stream(noisy, clean, [Utterance(0, 5, "so", "a")])]
    batch = data.side_by_side(streams, with_clean=True)
    assert batch.noisy.dtype == batch.clean.dtype == torch.int16
    assert batch.noisy[:, :5].tolist() == [[-32767] * 5, [16384] * 5]
    assert batch.clean[0, :6].tolist() == [16384] * 5 + [0]
    assert batch.audio_s == 10 / RATE_HZ
    assert data.side_by_side(streams, with_clean=False).clean is None


def test_a_share_of_the_streams_is_noise_without_words(pack, noise):
    augment = Augmenter(CLEAN, noise, random.Random(3))
    made = StreamSampler([(pack, pack.clips, 1.0)], augment, 3.0, p_empty=0.3)
    empty = [not made.stream().utterances for _ in range(200)]
    assert 0.2 < np.mean(empty) < 0.4
    assert all(made.stream(1.0).noisy.shape == (RATE_HZ,) for _ in range(9))


def test_spec_augment_blanks_bands_and_spans_only():
    mel = torch.rand(6, 400, 80) + 1.0
    out = data.spec_augment(mel, random.Random(0), -0.5, AugmentConfig())
    assert (mel >= 1.0).all()  # the input is left alone
    blank = out == -0.5
    assert torch.equal(out[~blank], mel[~blank])
    for row in blank:
        spans, bands = row.all(dim=1), row.all(dim=0)
        assert torch.equal(row, spans[:, None] | bands[None])
        assert spans.sum() <= 4 * 30
        assert bands.sum() <= 2 * 16
    assert len({int(row.sum()) for row in blank}) > 3  # every row has its own
