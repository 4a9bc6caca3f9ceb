"""tasks.py: instructions by prompt, and models that were not trained for them."""

from __future__ import annotations

import pytest

from sparqle_stream import arguments, cli, tasks
from sparqle_stream.config import ModelConfig
from sparqle_stream.errors import ConfigError


def options(*argv):
    return cli.stream_options(arguments.parser_for("").parse([*argv, "a.wav"], {}))


def test_transcription_needs_no_words():
    assert (options().prompt, options().instruction) == ("", "")
    assert options("--task", "transcribe", "--prompt", "Dr. Smith").instruction == ""


def test_a_task_is_no_part_of_the_prompt():
    """A client's prompt takes the place of the server's, and must not take the task's."""
    given = options("--task", "translate", "--to", "de", "--prompt", "Dr. Smith")
    assert (given.prompt, given.instruction) == ("Dr. Smith", "Translate into German:")
    assert options("--task", "answer").instruction == "Answer the question:"


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["--task", "translat"], "unknown task 'translat'", "use translate"),
        (["--task", "translate"], "needs a language, not ''", "--to one of ar, ca"),
        (["--task", "translate", "--to", "xx"], "needs a language, not 'xx'", "--to one of"),
        (["--to", "de"], "--to de goes with --task translate", "leave --to out"),
    ],
)
def test_what_cannot_be_asked_for_is_told(argv, message, hint):
    with pytest.raises(ConfigError, match=message) as err:
        options(*argv)
    assert err.value.hint.startswith(hint)


def test_a_model_says_what_it_was_not_trained_for(monkeypatch, tiny):
    from sparqle_stream import models

    monkeypatch.setattr(models, "load", lambda *args, **options: tiny)
    args = arguments.parser_for("").parse(["--task", "translate", "--to", "de", "a.wav"], {})
    with pytest.raises(ConfigError) as err:
        cli.load_engine(args)
    assert err.value.message == "the model was not trained to translate to de; it can transcribe"
    tasks.require("translate to de", (*ModelConfig().tasks, "translate to de"))
