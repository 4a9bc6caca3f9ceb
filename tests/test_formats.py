"""Output formats: cues that can be read, files that parse, and nothing that depends on packets."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_stream import formats, messages
from sparqle_stream.errors import ConfigError
from sparqle_stream.messages import Word

SPEECH = (
    "When in the course of human events, it becomes necessary for one people to dissolve the"
    " political bands which have connected them with another, a decent respect to the opinions of"
    " mankind requires that they should declare the causes. Yes. We hold these truths."
)


def spoken(text: str, start: float = 0.0, word_s: float = 0.3) -> list[Word]:
    """Words at an even pace; each leaves 0.4 s after its end."""
    words = []
    for word in text.split():
        words.append(Word(word, round(start, 3), round(start + word_s * 0.9, 3), start + 0.7))
        start += word_s
    return words


def finals(words: list[Word], segment: int = 0, per_event: int = 2) -> list[messages.Event]:
    """Final events of `per_event` words each, spaces as the engine puts them."""
    events: list[messages.Event] = []
    for i in range(0, len(words), per_event):
        group = tuple(words[i : i + per_event])
        text = "".join(f" {w.word}" for w in group)
        events.append(messages.Final(text, group, segment, time=group[-1].emitted))
    return events


def two_segments() -> list[messages.Event]:
    first, second = spoken("Hello there, world."), spoken("It is <late> & dark.", start=5.0)
    return [
        messages.SpeechStarted(0.0),
        *finals(first, 0),
        messages.SpeechStopped(2.0),
        messages.SpeechStarted(5.0),
        messages.Tail("it is", 5.5),
        *finals(second, 1),
        messages.SpeechStopped(7.0),
        messages.Done(duration=8.0, compute_seconds=2.0, time=8.0),
    ]


def written(kind: str, events: list[messages.Event], *, is_live: bool = False) -> str:
    out = io.StringIO()
    writer = formats.open_writer(kind, out, "talk.wav", is_live=is_live)
    for event in events:
        writer.add(event)
    writer.finish()
    return out.getvalue()


def cues_of(words: list[Word]) -> list[formats.Cue]:
    builder = formats.CueBuilder()
    cues = [cue for word in words for cue in builder.push(word)]
    return cues + builder.finish()


def test_txt_is_a_line_a_segment():
    assert written("txt", two_segments()) == "Hello there, world.\nIt is <late> & dark.\n"


def test_tsv_has_whole_milliseconds():
    rows = written("tsv", two_segments()).splitlines()
    assert rows == [
        "start\tend\ttext",
        "0\t870\tHello there, world.",
        "5000\t6470\tIt is <late> & dark.",
    ]


def test_srt_numbers_its_cues_and_vtt_has_its_header_and_escapes():
    srt = written("srt", two_segments())
    assert srt == (
        "1\n00:00:00,000 --> 00:00:01,118\nHello there, world.\n\n"
        "2\n00:00:05,000 --> 00:00:06,470\nIt is <late> & dark.\n\n"
    )
    vtt = written("vtt", two_segments())
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.118\n")
    assert "It is &lt;late&gt; &amp; dark." in vtt


def test_json_has_what_the_issue_names():
    line = written("jsonl", two_segments())
    assert line.count("\n") == 1
    found = json.loads(line)
    assert list(found) == [
        *("file", "duration", "text", "words", "segments", "compute_seconds", "rtf"),
    ]
    assert found["file"] == "talk.wav"
    assert (found["duration"], found["compute_seconds"], found["rtf"]) == (8.0, 2.0, 0.25)
    assert found["text"] == "Hello there, world. It is <late> & dark."
    assert found["words"][1] == {"word": "there,", "start": 0.3, "end": 0.57, "emitted": 1.0}
    assert found["segments"][1] == {"start": 5.0, "end": 6.47, "text": "It is <late> & dark."}
    assert json.loads(written("json", two_segments())) == found


def test_live_jsonl_is_the_final_events_as_on_the_wire():
    lines = written("jsonl", two_segments(), is_live=True).splitlines()
    events = [messages.from_json(line) for line in lines]
    assert "".join(event.text for event in events) == " Hello there, world. It is <late> & dark."


@pytest.mark.parametrize("kind", ["txt", "tsv", "srt", "vtt", "json", "jsonl"])
def test_silence_is_a_valid_file(kind):
    """A subtitle file without a header, or a broken JSON, is what other tools answer here."""
    text = written(kind, [messages.Done(duration=3.0, compute_seconds=0.0, time=3.0)])
    empty = {"txt": "", "srt": "", "vtt": "WEBVTT\n\n", "tsv": "start\tend\ttext\n"}
    if kind in empty:
        assert text == empty[kind]
    else:
        assert json.loads(text)["text"] == ""


@pytest.mark.parametrize("kind", ["txt", "tsv", "srt", "vtt"])
def test_words_are_on_disk_before_the_stream_ends(kind):
    """Somebody who pulls the plug keeps all but the last cue."""
    out = io.StringIO()
    writer = formats.open_writer(kind, out, "talk.wav", is_live=True)
    for event in two_segments()[:-1]:
        writer.add(event)
    assert "Hello there, world." in out.getvalue()


@pytest.mark.parametrize("kind", ["txt", "tsv", "srt", "vtt", "jsonl"])
def test_a_live_session_holds_no_more_after_a_day(kind):
    """It held every word that was ever said, 2 to 3 MB an hour, where lines are written at once."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            return len(text)

    writer = formats.open_writer(kind, Gone(), "talk.wav", is_live=True)

    def hear(n_segments: int) -> int:
        for i in range(n_segments):
            words = spoken("Hello there, world. And so it goes.", start=10.0 * i)
            for event in [*finals(words, i), messages.SpeechStopped(10.0 * i + 5)]:
                writer.add(event)
        return len(pickle.dumps({**vars(writer), "_out": None}))

    after_a_minute = hear(6)
    assert hear(300) <= after_a_minute + 100


def test_a_broken_stream_keeps_its_open_segment():
    events = two_segments()[:-2]  # neither the end of the speech nor of the stream
    for kind in ("txt", "srt", "jsonl"):
        assert "dark." in written(kind, events)


def test_cues_keep_to_the_rules_of_broadcasters():
    cues = cues_of(spoken(SPEECH))
    assert " ".join(line for cue in cues for line in cue.lines) == SPEECH
    for cue in cues:
        assert 1 <= len(cue.lines) <= 2
        assert all(len(line) <= 42 for line in cue.lines)
        assert cue.end - cue.start <= 7.0
    for cue, after in itertools.pairwise(cues):
        assert cue.end <= after.start
    assert cues[0].lines[0] == "When in the course of human events,"  # a break at the clause
    assert cues[-1].lines == ("We hold these truths.",)


def test_a_cue_does_not_reach_over_a_pause_and_stays_long_enough_to_read():
    words = spoken("One moment please") + spoken("back again", start=10.0)
    first, second = cues_of(words)
    assert first.lines == ("One moment please",)
    assert first.end == pytest.approx(1.0)  # one second at least, although 0.87 s long
    assert second.start == 10.0


def test_a_short_sentence_shares_its_cue():
    """'Mr.' and 'Yes.' alone on the screen would flicker."""
    (cue,) = cues_of(spoken("Mr. Smith is here now"))
    assert cue.lines == ("Mr. Smith is here now",)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.text("abc,.", min_size=1, max_size=60), st.floats(0, 3), st.floats(0, 9)),
        max_size=40,
    )
)
def test_any_words_make_ordered_cues_that_hold_every_word(parts):
    """Whatever the times: no cue overlaps the next, none is empty, nothing is lost."""
    start, words = 0.0, []
    for text, gap, length in parts:
        start += gap
        words.append(Word(text, start, start + length, start + length))
    cues = cues_of(words)
    assert " ".join(line for cue in cues for line in cue.lines).split() == [w.word for w in words]
    for cue in cues:
        assert cue.end > cue.start
    for cue, after in itertools.pairwise(cues):
        assert cue.end <= after.start + 1e-9


@settings(deadline=None, max_examples=25)  # no deadline: the machine may be busy
@given(st.integers(1, 50), st.sampled_from(["txt", "srt", "vtt", "tsv", "jsonl"]))
def test_grouping_of_words_into_events_changes_nothing(per_event, kind):
    words = spoken(SPEECH)
    done = [messages.Done(20.0, 1.0, 20.0)]
    assert written(kind, finals(words, 0, per_event) + done) == written(
        kind, finals(words, 0, 1) + done
    )


def test_what_has_no_space_before_it_in_the_text_has_none_in_a_cue():
    """A full stop can come with the next segment; the first word of all has no space either."""
    hello, stop, bye = Word("Hello", 0, 1, 2), Word(".", 1, 1.1, 3), Word("Bye", 1.2, 2, 3)
    events = [
        messages.Final("Hello", (hello,), 0, 2.0),
        messages.Final(". Bye", (stop, bye), 1, 3.0),
    ]
    assert "\nHello. Bye\n" in written("srt", events)
    assert json.loads(written("json", events))["text"] == "Hello. Bye"


def test_a_new_segment_number_ends_the_line_even_without_a_pause():
    """Long speech is cut where the model's slot is full: no `speech_stopped` in between."""
    events = finals(spoken("one two"), 0) + finals(spoken("three four", start=1.0), 1)
    assert written("txt", events) == "one two\nthree four\n"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "00:00:00.000"), (59.9996, "00:01:00.000"), (3_661.0421, "01:01:01.042")],
)
def test_timestamps_round_without_a_sixtieth_second(seconds, expected):
    assert formats.timestamp(seconds, ".") == expected
    assert re.fullmatch(r"\d\d:[0-5]\d:[0-5]\d,\d{3}", formats.timestamp(seconds, ","))


def test_a_folder_has_no_suffix(tmp_path):
    (tmp_path / "2026.07.18").mkdir()
    kinds = ("txt", "srt")
    assert formats.format_of(str(tmp_path / "2026.07.18"), None, kinds) == "txt"
    assert formats.format_of("captions.srt/", None, kinds) == "txt"


def test_the_format_is_asked_for_or_told_by_the_suffix():
    every = ("txt", "json", "srt")
    assert formats.format_of(None, None, every) == "txt"
    assert formats.format_of("talk.SRT", None, every) == "srt"
    assert formats.format_of("talk.txt", "json", every) == "json"
    with pytest.raises(ConfigError, match="no format for talk.doc") as caught:
        formats.format_of("talk.doc", None, every)
    assert caught.value.hint == "use --format txt, json or srt"
