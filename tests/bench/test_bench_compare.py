"""Compare: turns in their order, ratios by hand, and peers that do as much as they are told."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
from bench_card import CARD

from bench import compare, peers, report
from bench.peers import OURS, PEERS
from bench.settings import Settings
from sparqle_stream.errors import ConfigError

SECOND = 16_000


def turn(seconds: float, peak_mb: float, texts: tuple[str, ...] = ()) -> dict:
    return {
        "seconds": seconds,
        "rtf": seconds / 10,
        "load_seconds": 1.0,
        "peak_rss_mb": peak_mb,
        "texts": list(texts),
    }


def test_turns_alternate():
    """A B A B for each peer, so that what the machine does meanwhile hits both."""
    order: list[str] = []

    def run(name):
        order.append(name)
        return {"n": len(order)}

    pairs = compare.play(["b", "c"], 2, run)
    assert order == [OURS, "b", OURS, "b", OURS, "c", OURS, "c"]
    assert pairs == {
        "b": [({"n": 1}, {"n": 2}), ({"n": 3}, {"n": 4})],
        "c": [({"n": 5}, {"n": 6}), ({"n": 7}, {"n": 8})],
    }


def test_ratios_by_hand():
    """Rounds of 8 / 2 and 9 / 1 seconds: 4 and 9, whose geometric mean is 6."""
    pairs = [(turn(2.0, 500.0), turn(8.0, 1000.0)), (turn(1.0, 500.0), turn(9.0, 1000.0))]
    assert compare.ratios(pairs) == {
        "time": 6.0,
        "time_rounds": [4.0, 9.0],
        "memory": 2.0,
        "memory_rounds": [2.0, 2.0],
    }


@pytest.fixture
def versions(monkeypatch):
    monkeypatch.setattr("bench.peers.Peer.version", lambda peer: peer.packages[0] + " 1.2")


def test_a_result_by_hand(versions):
    """Ours: medians over the turns of all peers. One of two words is wrong in pocketsphinx."""
    ours = [turn(s, mb, ("good day",)) for s, mb in ((2.0, 500), (1.0, 510), (4.0, 505))]
    theirs = turn(8.0, 100.0, ("good night",))
    random = [turn(3.0, 900.0), turn(3.0, 950.0)]
    whisper = "transformers-base-offline"
    pairs = {
        "pocketsphinx": [(ours[0], theirs)],
        whisper: list(zip(ours[1:], random, strict=True)),
    }
    got = compare.result_of(pairs, ["Good day."])
    assert list(got) == ["ratios", "engines"]
    assert got["ratios"]["pocketsphinx"]["time"] == 4.0
    engines = got["engines"]
    assert list(engines) == [OURS, "pocketsphinx", whisper]
    assert (engines[OURS]["rtf"], engines[OURS]["peak_rss_mb"]) == (0.2, 510)
    assert [engines[name]["wer_percent"] for name in engines] == [0.0, 50.0, None]
    assert len(engines[OURS]["turns"]) == 3
    assert "texts" not in engines[OURS]["turns"][0]
    assert compare.result_of(pairs, [""])["engines"][OURS]["wer_percent"] is None
    result = got | {
        "bench": "compare",
        "settings": Settings(dtype="int8").summary(),
        "load": {"rounds": 2, "order": "A B A B", "threads": 2},
        "machine": CARD,
        "timing": {"machine_was_busy": False, "others_share_before": 0.0},
        "sets": [{"name": "test/x", "recordings": 1}],
        "audio_seconds": 10.0,
        "left_out": {"vosk": "vosk not installed"},
    }
    page = report.render([("c.json", json.loads(json.dumps(result)))])
    assert "| pocketsphinx | **4.00** (4.00) | **0.20** (0.20) |" in page
    assert "| transformers-base-offline | **1.50** (3.00, 0.75) |" in page
    assert "| sparqle: streaming | 0.200 | 0.200, 0.100, 0.400 | 510 MB | 0.0 |" in page
    assert "Left out: vosk (vosk not installed)." in page


def test_tokens_are_those_of_the_text_or_of_the_time():
    assert peers.tokens_for("ten words " * 5, 9 * SECOND) == 13
    assert peers.tokens_for("", 10 * SECOND) == 35
    assert peers.tokens_for("", 10) == 1


def heard() -> tuple[list[tuple[int, int]], peers.Hear]:
    calls: list[tuple[int, int]] = []

    def hear(pcm, n_tokens):
        calls.append((len(pcm), n_tokens))
        return ""

    return calls, hear


def test_a_whole_recording_goes_in_windows_of_half_a_minute():
    calls, hear = heard()
    peers.whole(hear)(np.zeros(75 * SECOND, np.float32), 150)
    assert calls == [(30 * SECOND, 60), (30 * SECOND, 60), (15 * SECOND, 30)]


def test_a_growing_window_is_decoded_again_each_second():
    """2.5 s: after 1, 2 and 2.5 s. Of 40 s the last windows are the last 30 s."""
    calls, hear = heard()
    peers.growing(hear)(np.zeros(5 * SECOND // 2, np.float32), 10)
    assert calls == [(SECOND, 4), (2 * SECOND, 8), (5 * SECOND // 2, 10)]
    calls, hear = heard()
    peers.growing(hear)(np.zeros(40 * SECOND, np.float32), 40)
    assert len(calls) == 40
    assert calls[29] == calls[39] == (30 * SECOND, 30)


def job(tmp_path, clips: list[tuple[np.ndarray, str]], wanted: Settings, weights=None):
    return compare._write_job(tmp_path, wanted, clips, weights or {})


def test_a_turn_hears_every_recording_once(tmp_path, monkeypatch):
    """After the warm-up, which does not count. RTF is of the audio, not of the warm-up."""
    calls, hear = heard()

    def slow(pcm, n_tokens):
        if len(calls) == 0:
            compare.time.sleep(0.3)  # of the warm-up
        return hear(pcm, n_tokens)

    fake = peers.Peer("fake", ("numpy",), lambda wanted: slow, has_real_weights=True)
    monkeypatch.setitem(PEERS, "fake", fake)
    clips = [(np.zeros(SECOND * n, np.float32), text) for n, text in ((4, "a b"), (1, ""))]
    path = job(tmp_path, clips, Settings(model="random:tiny", threads=1))
    got = compare.take_turn("fake", json.loads(path.read_text()))
    assert calls == [(3 * SECOND, 4), (4 * SECOND, 3), (SECOND, 4)]
    assert got["texts"] == ["", ""]
    assert got["load_seconds"] >= 0.3
    assert got["seconds"] < got["load_seconds"]
    assert got["rtf"] == pytest.approx(got["seconds"] / 5, abs=1e-3)
    assert got["peak_rss_mb"] > 10


def test_our_turn_writes_what_the_engine_writes(oracle, tmp_path, monkeypatch):
    from sparqle_stream import testing

    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: oracle)
    path = job(tmp_path, [(testing.say(["good", "day"]), "good day")], Settings(vad="off"))
    assert compare.take_turn(OURS, json.loads(path.read_text()))["texts"] == ["good day"]


def small(monkeypatch) -> None:
    """A Whisper that is made in no time."""
    monkeypatch.setitem(peers.SHAPES, "tiny", (32, 1, 2))


def test_random_whisper_writes_as_many_tokens_as_it_is_told(monkeypatch):
    small(monkeypatch)
    model = peers._random_whisper("tiny")
    monkeypatch.setattr(peers, "_random_whisper", lambda shape: model)
    calls = []
    decode = model.model.decoder.forward
    monkeypatch.setattr(
        model.model.decoder, "forward", lambda *a, **k: calls.append(1) or decode(*a, **k)
    )
    hear = peers._transformers("tiny", Settings(threads=1))
    hear(np.zeros(SECOND, np.float32), 5)
    assert len(calls) == 5


def test_shapes_are_whispers():
    """Weights of base and tiny, without the two tables of positions of the encoder's 1500."""
    from transformers import WhisperConfig

    assert peers.SHAPES == {"tiny": (384, 4, 6), "base": (512, 6, 8)}
    assert WhisperConfig().vocab_size == peers.VOCABULARY
    assert sum(p.numel() for p in peers._random_whisper("tiny").parameters()) == 37_760_640


def test_ctranslate2_writes_as_many_tokens_as_it_is_told(monkeypatch, tmp_path):
    for package in ("ctranslate2", "faster_whisper"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install -e .[peers])")
    import ctranslate2

    small(monkeypatch)
    written = []

    class Whisper(ctranslate2.models.Whisper):
        def generate(self, *arguments, **options):
            found = super().generate(*arguments, **options)
            written.append(len(found[0].sequences_ids[0]))
            return found

    monkeypatch.setattr(ctranslate2.models, "Whisper", Whisper)
    peers._write_ctranslate2("tiny", tmp_path)
    hear = peers._ctranslate2(Settings(threads=1), tmp_path)
    for n in (5, 20):
        hear(np.zeros(SECOND, np.float32), n)
    assert written == [5, 20]


def test_what_a_peer_loads_is_written_by_another_process(folder, idle, monkeypatch, capsys):
    """Before the turns; the peer is given the folder, and nothing of what made it."""
    for package in ("ctranslate2", "faster_whisper"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install -e .[peers])")
    small(monkeypatch)
    asked, ours = [], compare._ours

    def in_this_process(arguments, env):
        asked.append(arguments[:2])
        if arguments[0] == compare.WRITE:  # with the shape that this test has made small
            assert compare.main(list(arguments)) == 0
            return ""
        return ours(arguments, env)

    monkeypatch.setattr(compare, "_ours", in_this_process)
    name = "faster-whisper-tiny-offline"
    arguments = ["--peers", name, "--rounds", "1", "--model", "random:tiny", "--vad", "off"]
    assert compare.main([str(folder), *arguments, "--threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert asked == [[compare.WRITE, name], [compare.TURN, OURS], [compare.TURN, name]]
    # Torch and the float32 model are not in what it takes.
    assert result["engines"][name]["peak_rss_mb"] < result["engines"][OURS]["peak_rss_mb"] + 100


# --- real weights of others --------------------------------------------------------------------


class FakeVosk(types.ModuleType):
    """The part of Vosk's Python API that is used: utterances end with every second piece."""

    def __init__(self) -> None:
        super().__init__("vosk")
        self.pieces: list[int] = []
        self.opened: list[str] = []

    def SetLogLevel(self, level):
        assert level == -1

    def Model(self, model_path):
        if not model_path.endswith("vosk-model-x"):
            raise Exception("Failed to create a model")
        self.opened.append(model_path)
        return "model"

    def KaldiRecognizer(self, model, rate):
        assert (model, rate) == ("model", SECOND)
        return self

    def AcceptWaveform(self, data):
        self.pieces.append(len(data) // 2)
        return len(self.pieces) % 2 == 0

    def Result(self):
        return json.dumps({"text": f"said {len(self.pieces)}"})

    def FinalResult(self):
        return json.dumps({"text": "at last"})


def test_vosk_hears_pieces_of_a_recording(monkeypatch, tmp_path):
    fake = FakeVosk()
    monkeypatch.setitem(sys.modules, "vosk", fake)
    folder = tmp_path / "vosk-model-x"
    folder.mkdir()
    hear = PEERS["vosk"].make(Settings(), folder)
    assert hear(np.zeros(SECOND // 2, np.float32), 1) == "said 2 at last"
    assert fake.pieces == [SECOND // 5, SECOND // 5, SECOND // 10]
    with pytest.raises(ConfigError, match="cannot load"):
        PEERS["vosk"].make(Settings(), tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        PEERS["vosk"].make(Settings(), tmp_path / "none")


def test_moonshine_is_told_by_its_folder(tmp_path):
    pytest.importorskip("moonshine_voice", reason="not installed (pip install -e .[peers])")
    for name, what in (("base-en", "cannot load base-en"), ("x", "nobody can tell")):
        (tmp_path / name).mkdir()
        with pytest.raises(ConfigError, match=what):
            PEERS["moonshine"].make(Settings(), tmp_path / name)


def test_real_whisper_is_used_as_its_defaults_have_it(monkeypatch, tmp_path):
    pytest.importorskip("faster_whisper", reason="not installed (pip install -e .[peers])")
    import faster_whisper

    class Model:
        def __init__(self, folder, **options):
            assert options["local_files_only"]
            assert (options["device"], options["cpu_threads"]) == ("cpu", 2)

        def transcribe(self, pcm, language):
            assert language == "en"
            return iter([SimpleNamespace(text=" good"), SimpleNamespace(text=" day")]), None

    monkeypatch.setattr(faster_whisper, "WhisperModel", Model)
    hear = PEERS["faster-whisper"].make(Settings(threads=2), tmp_path)
    assert hear(np.zeros(SECOND, np.float32), 1) == "good day"


def test_a_folder_of_no_model_is_said(tmp_path):
    pytest.importorskip("faster_whisper", reason="not installed (pip install -e .[peers])")
    with pytest.raises(ConfigError, match="faster-whisper cannot load"):
        PEERS["faster-whisper"].make(Settings(threads=1), tmp_path)


def test_pocketsphinx_hears_words(clip):
    pytest.importorskip("pocketsphinx", reason="not installed (pip install -e .[peers])")
    hear = PEERS["pocketsphinx"].make(Settings())
    assert len(hear(clip[: 4 * SECOND], 1).split()) >= 3


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def folder(make_folder):
    return make_folder("sets/x", [{"said": "good day", "text": "good day"}])


def test_a_whole_run(folder, idle, monkeypatch, capsys):
    """A peer of one function, in real processes, beside the tiny model."""
    monkeypatch.setitem(PEERS, "fake", peers.Peer("fake", ("numpy",), None))  # type: ignore
    take = compare._in_a_process
    seen = []

    def in_a_process(path, threads):
        run = take(path, threads)

        def one(name):
            seen.append(name)
            return run(name) if name == OURS else turn(2.0, 100.0)

        return one

    monkeypatch.setattr(compare, "_in_a_process", in_a_process)
    arguments = ["--peers", "fake", "--rounds", "1", "--model", "random:tiny", "--vad", "off"]
    assert compare.main([str(folder), *arguments, "--threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert seen == [OURS, "fake"]
    assert list(result)[:2] == ["bench", "ratios"]
    (mine,) = result["engines"][OURS]["turns"]
    assert result["ratios"]["fake"]["time"] == pytest.approx(2.0 / mine["seconds"], rel=0.01)
    assert result["load"]["threads"] == 1
    assert result["audio_seconds"] == pytest.approx(0.04 * 8 + 2 * 0.16, abs=0.001)
    lacking = {name for name, peer in PEERS.items() if peer.missing() or peer.wants_weights}
    assert set(result["left_out"]) == lacking
    assert result["left_out"]["vosk"] in ("vosk not installed", "no weights given")
    assert result["machine"]["weights_hash"]
    assert result["bound"]["chunk_ms_at_least"] > 0
    assert result["load"]["seed"] == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--peers", "nobody"], "unknown peer 'nobody'"),
        (["--rounds", "0"], "--rounds 0"),
        (["--plot", "x.pdf"], "no PNG"),
        (["--weights", "vosk"], "--weights vosk"),
        (["--weights", "vosk=/no/such/folder"], "vosk=/no/such/folder"),
        (["--weights", "pocketsphinx=."], "pocketsphinx=."),
        (["--peers", "vosk"], "vosk needs"),
    ],
)
def test_errors_say_what_to_do(idle, capsys, arguments, what):
    assert compare.main(arguments) == 2
    said = capsys.readouterr().err
    assert what in said
    assert "hint: " in said


def test_a_peer_that_is_not_installed(idle, monkeypatch, capsys):
    absent = peers.Peer("absent", ("no-such-package",), lambda wanted: None)
    monkeypatch.setitem(PEERS, "absent", absent)
    assert compare.main(["--peers", "absent"]) == 2
    assert "absent needs no-such-package" in capsys.readouterr().err


def test_a_busy_machine_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("bench.machine.busy_share", lambda: 0.6)
    assert compare.main(["--peers", "transformers-tiny-offline"]) == 2
    assert "--force" in capsys.readouterr().err


def test_peers_are_known_by_their_packages():
    assert PEERS["transformers-base-growing"].missing() == ""
    is_there = importlib.util.find_spec("pocketsphinx") is not None
    assert PEERS["pocketsphinx"].missing() == ("" if is_there else "pocketsphinx")
    assert PEERS["transformers-tiny-offline"].version().startswith("transformers 5")
