"""settings.py: TOML becomes frozen configs; what does not fit is told with the file's name."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from sparqle_stream.errors import ConfigError
from training.settings import read_config


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Whole:
    parts: tuple[Part, ...]
    sizes: tuple[int, ...] = (1,)
    one: Part = field(default_factory=lambda: Part("none"))


def read(tmp_path, text):
    (tmp_path / "a.toml").write_text(text)
    return read_config(Whole, tmp_path / "a.toml")


def test_tables_and_lists_become_what_the_fields_say(tmp_path):
    text = "sizes = [2, 3]\n[one]\nname = 'x'\n[[parts]]\nname = 'y'\nweight = 2.0\n"
    assert read(tmp_path, text) == Whole((Part("y", 2.0),), (2, 3), Part("x"))
    assert read(tmp_path, "parts = []") == Whole(())
    assert read(tmp_path, "[[parts]]\nname = 'x'\nweight = 2") == Whole((Part("x", 2),))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("parts = []\nsize = [1]", "a.toml: unknown option size", "did you mean sizes?"),
        ("[[parts]]\nnam = 'x'", "a.toml: unknown option nam", "did you mean name?"),
        ("sizes = [1]", "a.toml: parts missing", "see training/configs"),
        ("parts = [", "cannot read .*a.toml", "see training/configs"),
        ("parts = 5", "a.toml: parts = 5 is not a list", "see training/configs"),
        ("parts = []\none = 'x'", "a.toml: one = 'x' is not a table", "see training/configs"),
        ("parts = []\nsizes = ['1']", "a.toml: sizes = '1' is not int", "see training/configs"),
        ("parts = []\nsizes = [true]", "a.toml: sizes = True is not int", "see training/configs"),
        (
            "[[parts]]\nname = 'x'\nweight = '2'",
            "weight = '2' is not float",
            "see training/configs",
        ),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, text, message, hint):
    with pytest.raises(ConfigError, match=message) as err:
        read(tmp_path, text)
    assert err.value.hint == hint
