"""The page: captions of a file and of a microphone in a real browser, by keyboard alone."""

from __future__ import annotations

import http.client
import io
import re
import wave
from importlib.resources import files
from urllib.parse import urlsplit

import av
import browser
import numpy as np
import pytest
from server_harness import WAIT_S, s16, serving

from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.server import page

OFF = StreamOptions(vad=VadConfig(kind="off"))
WORDS = testing.vocabulary(40)
WEB = files("sparqle_stream") / "web"
needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def oracle():
    with testing.oracle_engine(EngineConfig(n_slots=4)) as engine:
        yield engine


def write_wav(path, pcm) -> str:
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(s16(pcm))
    return str(path)


def fetch(url: str, path: str) -> tuple[int, dict[str, str], bytes]:
    host, port = url.removeprefix("ws://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, {k.lower(): v for k, v in response.headers.items()}, body


def test_every_file_is_served_with_its_policy(oracle):
    """Also where a key is asked for: the page asks for it itself."""
    with serving(oracle, api_key="k") as url:
        for name in ("", *page.FILES):
            status, headers, body = fetch(url, f"/{name}")
            assert status == 200
            assert headers["content-type"] == f"{page.FILES[name or 'index.html']}; charset=utf-8"
            assert "default-src 'none'" in headers["content-security-policy"]
            assert body == (WEB / (name or "index.html")).read_bytes()
        assert fetch(url, "/page.py")[0] == 404
        assert fetch(url, "/..%2fcli.py")[0] == 404


def test_nothing_is_asked_of_anybody_else():
    for entry in WEB.iterdir():
        text = entry.read_text(encoding="utf-8")
        assert entry.name in page.FILES
        assert not re.findall(r"(?:https?|wss?)://[\w.]", text), entry.name
        assert "innerHTML" not in text, "what was said is text"
        assert "style=" not in text, "the policy forbids it"


def test_every_control_has_a_name():
    text = (WEB / "index.html").read_text(encoding="utf-8")
    for tag, attributes, inner in re.findall(r"<(button|input)\b([^>]*)>([^<]*)", text):
        identity = re.search(r'id="(\w+)"', attributes)[1]
        has_label = f'for="{identity}"' in text
        assert has_label if tag == "input" else inner.strip(), identity


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast():
    """4.5:1 for text everywhere, also for the grey tail; 7:1 for all of it in high contrast."""
    css = (WEB / "page.css").read_text(encoding="utf-8")
    looks = re.findall(r":root(?:\.contrast)? \{([^}]*--ground: #[^}]*)\}", css)
    assert len(looks) == 3
    for i, look in enumerate(looks):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", look))
        ground = luminance(colours["ground"])
        for name in ("text", "tail"):
            light, dark = sorted([ground, luminance(colours[name])], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= (7 if i == 2 else 4.5), (name, look)


CAPTIONS = "document.getElementById('captions').innerText.trim()"
STATUS = "document.getElementById('status').textContent"


@needs_browser
def test_a_file_by_keyboard_alone(oracle, tmp_path):
    """Key, file, captions, large text, high contrast, subtitles: no mouse is needed for any."""
    name = write_wav(tmp_path / "talk.wav", testing.say(WORDS))
    with serving(oracle, defaults=OFF, api_key="a key/with=odd characters") as url:
        address = url.replace("ws", "http", 1)
        with browser.open_page() as tab:
            tab.goto(address)
            reached = []
            for _ in range(9):
                tab.press("Tab")
                reached.append(tab.run("document.activeElement.id"))
                if reached[-1] in ("large", "contrast"):
                    tab.press("Enter")
                if reached[-1] == "key":
                    tab.call("Input.insertText", text="a key/with=odd characters")
            for control in ("mic", "file", "large", "contrast", "key", "captions"):
                assert control in reached
            assert tab.run("document.documentElement.className") == "large contrast"
            tab.choose_file("#file", name)
            tab.wait_for(f"{STATUS} === 'Done.'")
            assert tab.run(CAPTIONS).split() == WORDS
            assert tab.run("document.querySelectorAll('.tail:not(:empty)').length") == 0
            tab.run(
                "window.saved = null; URL.createObjectURL = (b) => (b.text().then((t) =>"
                " (window.saved = t)), 'data:,')"
            )
            tab.run("document.getElementById('srt').focus()")
            tab.press("Enter")
            tab.wait_for("window.saved !== null")
            srt = tab.run("window.saved")
            tab.run("document.getElementById('large').click()")
            tab.goto(address)
            kept = tab.run("document.documentElement.className")
            assert tab.problems == []
            hosts = {urlsplit(u).netloc for u in tab.urls if not u.startswith("data:")}
            assert hosts == {urlsplit(address).netloc}
    assert srt.startswith("1\n00:00:00,")
    assert [w for w in srt.split() if w in WORDS] == WORDS
    assert max(len(line) for line in srt.splitlines()) <= 42
    assert kept == "contrast", "the choice is remembered"


@needs_browser
def test_a_microphone_that_plays_a_recording(tiny, clip, tmp_path):
    """Real speech through the browser's own capture at its own rate; the model is random."""
    from sparqle_stream.engine import Engine

    name = write_wav(tmp_path / "clip.wav", np.clip(clip[: 16_000 * 8], -1, 1))
    with Engine(tiny, EngineConfig(n_slots=2, threads=1)) as engine, serving(engine) as url:
        with browser.open_page(fake_microphone=name) as tab:
            tab.goto(url.replace("ws", "http", 1))
            tab.run("document.getElementById('mic').focus()")
            tab.press("Enter")
            tab.wait_for("document.activeElement.id === 'stop'")
            tab.wait_for("document.getElementById('level').value > 0.02")
            tab.wait_for(f"{CAPTIONS}.length > 5")
            tab.press("Enter")
            tab.wait_for(f"{STATUS} === 'Done.'")
            assert tab.run("document.activeElement.id") == "mic"
            assert tab.run("document.getElementById('lag').value").endswith(" s")
            assert tab.problems == []
        assert engine.metrics().n_streams == 0
        assert engine.metrics().audio_seconds > 0.5


@needs_browser
def test_a_wrong_key_and_a_file_that_is_none(oracle, tmp_path):
    (tmp_path / "x.wav").write_text("no sound")
    good = write_wav(tmp_path / "good.wav", testing.say(["word"]))
    with serving(oracle, api_key="k") as url, browser.open_page() as tab:
        tab.goto(url.replace("ws", "http", 1))
        tab.choose_file("#file", str(tmp_path / "x.wav"))
        tab.wait_for(f"{STATUS}.includes('no sound')")
        tab.choose_file("#file", good)
        tab.wait_for(f"{STATUS}.includes('is the key wrong?')")
        assert tab.run("document.getElementById('mic').disabled") is False


@needs_browser
def test_a_lost_connection_is_made_again(oracle, tmp_path):
    from chaos import FOREVER, Chaos

    name = write_wav(tmp_path / "talk.wav", testing.say(WORDS))
    lives = iter([(1e12, 4_000.0), (1e12, 3_000.0)])
    with serving(oracle, defaults=OFF) as url:
        port = int(url.rpartition(":")[2])
        with Chaos(lambda: port, lambda _: FOREVER) as chaos, browser.open_page() as tab:
            tab.goto(chaos.url.replace("ws", "http", 1))
            tab.run("performance.now()")
            chaos._lives = lambda _: next(lives, FOREVER)
            tab.choose_file("#file", name)
            tab.wait_for(f"{STATUS} === 'Done.'")
            assert tab.run(CAPTIONS).split() == WORDS
            assert chaos.n_cut >= 1


CLEAR = {"r": 0, "g": 0, "b": 0, "a": 0}
FORM = "document.querySelector('form')"


def pixels(png: bytes):
    """A screenshot -> (H, W, 4): red, green, blue, how much of it is there."""
    with av.open(io.BytesIO(png)) as picture:
        return next(picture.decode(video=0)).to_ndarray(format="rgba")


@needs_browser
def test_an_overlay(tiny, clip, tmp_path):
    """Words alone over whatever is behind, by themselves; the controls come with the Tab key."""
    from sparqle_stream.engine import Engine

    name = write_wav(tmp_path / "clip.wav", np.clip(clip[: 16_000 * 8], -1, 1))
    with (
        Engine(tiny, EngineConfig(n_slots=2, threads=1)) as engine,
        serving(engine) as url,
        browser.open_page(fake_microphone=name) as tab,
    ):
        tab.call("Emulation.setDefaultBackgroundColorOverride", color=CLEAR)
        tab.goto(f"{url.replace('ws', 'http', 1)}/?theme=transparent&start")
        tab.wait_for(f"{CAPTIONS}.length > 5")
        shown = pixels(tab.screenshot())
        assert shown[0, 0, 3] == 0, "nothing is drawn where no words are"
        assert shown[len(shown) // 2 :, :, 3].max() == 255
        assert tab.run(f"{FORM}.offsetWidth") < 5
        tab.press("Tab")
        assert tab.run("document.activeElement.closest('form') !== null")
        assert tab.run(f"{FORM}.offsetWidth") > 100, "out of reach"
        top = tab.run(f"Math.round({FORM}.getBoundingClientRect().top)")
        assert pixels(tab.screenshot())[top + 3, 450].tolist() == [0, 0, 0, 255], "on black"
        tab.goto(f"{url.replace('ws', 'http', 1)}/?theme=transparent&start&contrast")
        tab.wait_for(f"{CAPTIONS}.length > 5")
        box = "getComputedStyle(document.getElementById('captions')).backgroundColor"
        assert tab.run(box) == "rgb(0, 0, 0)"
        assert tab.problems == []


@needs_browser
def test_an_overlay_without_a_key(oracle, tmp_path):
    """It has no hands: what is wrong is shown, and it tries again until somebody types the key."""
    name = write_wav(tmp_path / "talk.wav", testing.say(WORDS))
    with (
        serving(oracle, defaults=OFF, api_key="k") as url,
        browser.open_page(fake_microphone=name) as tab,
    ):
        tab.goto(f"{url.replace('ws', 'http', 1)}/?theme=transparent&start")
        tab.wait_for(f"{STATUS}.includes('did not accept')")
        assert tab.run("document.querySelector('header').offsetHeight > 0")
        tab.run("document.getElementById('key').focus()")
        tab.call("Input.insertText", text="k")
        tab.wait_for(f"{STATUS}.startsWith('Listening')")
        assert tab.run("document.querySelector('header').offsetHeight") == 0
