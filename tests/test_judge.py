"""Judge: log p of readings after plain text is the LLM's own, and disturbs nobody."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparqle_stream import llm as llm_stage
from sparqle_stream.errors import ModelError
from sparqle_stream.judge import Judge, TextPrefix, n_slots
from sparqle_stream.plain_text import (
    LONGEST,
    MOST_READ,
    MOST_RIVALS,
    MOST_WAITING,
    N_LAST,
    PlainText,
)
from tests.prefixes import BEFORE, USED, prefix_of

SAID = [90, 91, 92]
READINGS = [[100], [100, 101, 102], [99, 98]]


def judge_of(model, n_rows=2):
    prefix = prefix_of(model)
    state = llm_stage.init_state(model.cfg.llm, n_slots(prefix, n_rows))
    return Judge(model.llm, state, prefix, n_rows, model.tokenizer.bos_id)


@torch.inference_mode()
def whole(model, said, reading):
    """log p by one pass over everything, prefix tokens and all."""
    bias, ids = prefix_of(model).bias, torch.tensor(USED)
    tokens = torch.tensor([[*BEFORE, model.tokenizer.bos_id, *said, *reading]])
    hidden = model.llm.forward_train(model.llm.embed(tokens))[0, -len(reading) - 1 : -1]
    logits = model.llm.logits(hidden) + bias
    log_probs = logits - logits[:, ids].logsumexp(dim=-1, keepdim=True)
    return float(log_probs.gather(1, torch.tensor(reading)[:, None]).sum())


def test_readings_are_judged_as_the_llm_would_read_them_alone(tiny):
    judge = judge_of(tiny)
    judge.say(0, SAID)
    got = judge.judge({0: READINGS})[0]
    assert got == pytest.approx([whole(tiny, SAID, r) for r in READINGS], abs=1e-3)
    judge.say(0, [100, 101])
    got = judge.judge({0: READINGS})[0]
    assert got == pytest.approx([whole(tiny, [*SAID, 100, 101], r) for r in READINGS], abs=1e-3)


def test_what_was_judged_before_changes_nothing(tiny):
    often, once = judge_of(tiny), judge_of(tiny)
    for ids in SAID:
        often.judge({0: [[95, 96, 97], [60]]})
        often.say(0, [ids])
    once.say(0, SAID)
    assert often.judge({0: READINGS})[0] == pytest.approx(once.judge({0: READINGS})[0], abs=1e-4)


def test_rows_are_alone(tiny):
    both, alone = judge_of(tiny), judge_of(tiny)
    both.say(0, [60] * 9)
    both.say(1, SAID)
    alone.say(1, SAID)
    got = both.judge({0: READINGS, 1: READINGS})
    assert got[1] == pytest.approx(alone.judge({1: READINGS})[1], abs=1e-4)
    assert got[0] != pytest.approx(got[1], abs=1e-2)


def test_a_new_stream_knows_nothing_of_the_old_one(tiny):
    used = judge_of(tiny)
    used.say(0, SAID)
    used.judge({0: READINGS})
    used.wipe(0)
    assert used.judge({0: READINGS})[0] == pytest.approx(
        [whole(tiny, [], r) for r in READINGS], abs=1e-3
    )


def test_captions_are_not_touched(tiny):
    judge = judge_of(tiny)
    state = llm_stage.prefill(tiny.llm, judge.state, [[1, 5, 7], [1]])
    k, v, length = state.k[:, :2].clone(), state.v[:, :2].clone(), state.length[:2].clone()
    judge.say(0, SAID)
    judge.judge({0: READINGS, 1: READINGS})
    assert torch.equal(state.k[:, :2], k)
    assert torch.equal(state.v[:, :2], v)
    assert torch.equal(state.length[:2], length)


def test_a_slot_that_is_full_goes_on_after_the_last_words(tiny):
    cfg = replace(tiny.cfg.llm, n_slot=len(BEFORE) + N_LAST + LONGEST + 20)
    prefix = prefix_of(tiny)
    state = llm_stage.init_state(cfg, n_slots(prefix, 1))
    judge = Judge(tiny.llm, state, prefix, 1, tiny.tokenizer.bos_id)
    said = [60 + i % 40 for i in range(300)]
    for i in range(0, 300, 4):
        judge.say(0, said[i : i + 4])
        judge.judge({0: [[100]]})
    judge.plain._begin(0)
    got = judge.judge({0: READINGS})[0]
    assert got == pytest.approx([whole(tiny, said[-N_LAST:], r) for r in READINGS], abs=1e-3)


def test_long_readings_and_many_of_them(tiny):
    judge = judge_of(tiny, 1)
    long = [60 + i % 40 for i in range(3 * MOST_READ)]
    got = judge.judge({0: [long, [100]]})[0]
    assert got == pytest.approx(
        [whole(tiny, [], long[:MOST_READ]), whole(tiny, [], [100])], abs=1e-3
    )
    assert len(judge.judge({0: [[100]] * MOST_RIVALS})[0]) == MOST_RIVALS


def test_plain_text_is_bounded():
    plain = PlainText(1, 640, 1)
    for i in range(10_000):
        plain.say(0, [i])
        assert len(plain._waiting[0]) <= MOST_WAITING + 1
    due = plain.take(0, 0)
    assert due.is_new
    assert due.ids[-1] == 9_999
    assert plain.take(0, 30) == ([], False)


def test_plain_text_begins_anew_before_the_slot_is_full():
    plain, filled = PlainText(1, 200, 1), 0
    for i in range(1_000):
        plain.say(0, [i, i])
        ids, is_new = plain.take(0, filled)
        filled = len(ids) + (0 if is_new else filled)
        assert filled + MOST_READ <= 200
        assert ids[-2:] == [i, i]


def test_a_prefix_of_another_llm_is_refused(tiny):
    prefix, cfg = prefix_of(tiny), tiny.cfg.llm
    stored = {"k": prefix.k, "v": prefix.v, "ids": prefix.ids, "bias": prefix.bias[prefix.ids]}
    assert TextPrefix.of({}, cfg) is None
    again = TextPrefix.of(stored, cfg)
    assert again is not None
    assert torch.equal(again.bias[prefix.ids], prefix.bias[prefix.ids])
    with pytest.raises(ModelError, match="of another LLM"):
        TextPrefix.of(stored, replace(cfg, n_layers=3))
    with pytest.raises(ModelError, match="of another LLM"):
        TextPrefix.of(stored, replace(cfg, vocab=50))
    with pytest.raises(ModelError, match="leaves no room in slots of 160"):
        TextPrefix.of(stored, replace(cfg, n_slot=160))
    with pytest.raises(ModelError, match=r"no text\.bias"):
        TextPrefix.of({name: x for name, x in stored.items() if name != "bias"}, cfg)
