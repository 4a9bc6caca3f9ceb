"""joint.py: the rows that the LLM is taught are the rows that it will be served."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_stream import llm as llm_stage
from sparqle_stream.config import QUERY_MS, LlmConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.llm import Llm
from sparqle_stream.writer import Greedy
from training import joint
from training.bridge import JointConfig, load_config
from training.corpus import PackWriter
from training.data import Utterance
from training.joint import Trainer
from training.place import HERE
from training.rows import Row, interleave, merged
from training.sources import Source, warn_of_plain

CONFIGS = Path(joint.__file__).parent / "configs"
PREFIX = [1, 7, 9]


def spoken_words(ends):
    """Words with one, two or three tokens of their own, ending at `ends` (ms)."""
    return [([100 + 10 * i + j for j in range(1 + i % 3)], end) for i, end in enumerate(ends)]


segments = st.fixed_dictionaries(
    {
        "ends": st.lists(st.integers(0, 6000), max_size=15).map(sorted),
        "n_queries": st.integers(1, 40),
        "chunk_queries": st.sampled_from([1, 2, 4, 8, 16]),
        "delay_ms": st.sampled_from([0, 40, 80, 240, 500, 960]),
    }
)


def chunks_of(row, chunk_queries, n_queries, first_query=0):
    """The row after its prefix, chunk by chunk -> [(queries, tokens)]."""
    items, at, chunks = row.items[len(PREFIX) :], 0, []
    query = first_query
    while query < n_queries:
        size = min(chunk_queries, n_queries - query)
        assert items[at : at + size] == [("q", i) for i in range(query, query + size)]
        at, query = at + size, query + size
        tokens = []
        while at < len(items) and items[at][0] == "t":
            tokens.append(items[at][1])
            at += 1
        chunks.append(tokens)
    assert at == len(items)
    return chunks


@settings(max_examples=200)
@given(segment=segments)
def test_a_word_lands_in_the_first_chunk_that_may_have_it(segment):
    """The first whose end is `delay_ms` or more after the word's; later words are not taught."""
    words = spoken_words(segment["ends"])
    n_queries, chunk_queries = segment["n_queries"], segment["chunk_queries"]
    row = interleave(words, n_queries, chunk_queries, segment["delay_ms"], PREFIX)
    assert row.items[: len(PREFIX)] == [("t", i) for i in PREFIX]
    chunks = chunks_of(row, chunk_queries, n_queries)
    ends_ms = [min((i + 1) * chunk_queries, n_queries) * QUERY_MS for i in range(len(chunks))]
    expected = [[] for _ in chunks]
    for tokens, end in words:
        may = [i for i, chunk_end in enumerate(ends_ms) if chunk_end - end >= segment["delay_ms"]]
        if may:
            expected[may[0]] += tokens
    assert chunks == expected


@settings(max_examples=200)
@given(segment=segments)
def test_targets_stand_where_they_are_decided(segment):
    """A decision before every token and one that ends every chunk; the token follows at once."""
    words = spoken_words(segment["ends"])
    n_queries, chunk_queries = segment["n_queries"], segment["chunk_queries"]
    row = interleave(words, n_queries, chunk_queries, segment["delay_ms"], PREFIX)
    assert [row.items[at + 1] for at in row.text_at] == [("t", i) for i in row.text_ids]
    assert [at for at, stop in zip(row.stop_at, row.stop, strict=True) if not stop] == row.text_at
    is_end = [
        at >= len(PREFIX) and (at + 1 == len(row.items) or row.items[at + 1][0] == "q")
        for at in range(len(row.items))
    ]
    stops = [at for at, stop in zip(row.stop_at, row.stop, strict=True) if stop]
    assert len(stops) == -(-n_queries // chunk_queries)
    # Inside a chunk no text stands between queries, so a chunk ends where its last query or
    # its last token does.
    assert stops == sorted(stops)
    assert all(is_end[at] for at in stops)
    assert row.stop_at == sorted(set(row.stop_at))


@settings(max_examples=100)
@given(segment=segments, first=st.integers(1, 5), n_again=st.integers(0, 13))
def test_a_row_after_a_seam_is_the_end_of_the_whole_one(segment, first, n_again):
    """Its queries begin `n_again` before the seam, without text; from there on both are equal."""
    words, chunk_queries = spoken_words(segment["ends"]), segment["chunk_queries"]
    n_queries = (first + 2) * chunk_queries
    args = words, n_queries, chunk_queries, segment["delay_ms"], PREFIX
    whole, row = interleave(*args), interleave(*args, first, n_again)
    seam = first * chunk_queries
    again = [("q", i) for i in range(max(0, seam - n_again), seam)]
    n_before = len(PREFIX) + len(again)
    assert row.items[len(PREFIX) : n_before] == again
    rest = whole.items[whole.items.index(("q", seam)) :]
    assert row.items[n_before:] == rest
    shift = len(whole.items) - len(row.items)
    begin = len(whole.items) - len(rest)
    kept = [i for i, at in enumerate(whole.stop_at) if at >= begin]
    assert row.stop_at == [whole.stop_at[i] - shift for i in kept]
    assert row.stop == [whole.stop[i] for i in kept]
    assert row.text_at == [at - shift for at in whole.text_at if at >= begin]


# --- against the serving loop --------------------------------------------------------------------

LLM = LlmConfig(
    width=32, n_layers=2, n_heads=4, n_kv_heads=2, head_width=8, ffn=64, vocab=300, n_slot=256
)
CHUNK_QUERIES, MOST = 2, 12


@pytest.fixture
def llm():
    torch.manual_seed(4)
    llm = Llm(LLM).requires_grad_(False)
    for parameter in llm.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=1.3 * parameter.shape[1] ** -0.5)
    llm.tokens.weight.normal_()
    llm.stop.weight.mul_(10.0)
    llm.stop.bias.zero_()
    return llm


def serve(llm, queries, prefix, first, n_again):
    """What the engine does with one segment: prefix, queries again, then chunks that write."""
    active = torch.tensor([True])
    state = llm_stage.init_state(LLM, 1)
    state = llm_stage.prefill(llm, state, [prefix])
    seam = first * CHUNK_QUERIES
    state = llm_stage.append(llm, state, queries[None, seam - n_again : seam], active)
    chunks = []
    for at in range(seam, len(queries), CHUNK_QUERIES):
        state, tokens = llm_stage.step(
            llm, state, queries[None, at : at + CHUNK_QUERIES], active, [Greedy(MOST)]
        )
        assert len(tokens[0]) < MOST, "the cap ended this chunk, not the stop head"
        chunks.append(tokens[0])
    return chunks, state


def make_trainer(llm, **options):
    """A trainer without its files: what makes rows and losses needs the LLM only."""
    trainer = object.__new__(Trainer)
    trainer.cfg = JointConfig("", "", "", (), **options)
    trainer.rng, trainer.place = random.Random(0), HERE
    tokenizer = SimpleNamespace(bos_id=1, encode=lambda text: [10 + ord(c) % 50 for c in text])
    trainer.bridge = SimpleNamespace(llm=llm, stop=llm.stop if llm else None, tokenizer=tokenizer)
    return trainer


def test_the_served_text_is_what_the_row_would_teach(llm):
    """Text that the engine's loop wrote by itself, taught back: no decision would be different.

    Three segments of unequal length, one of them after a seam with queries heard again.
    """
    gen = torch.Generator().manual_seed(0)
    queries = 2.0 * torch.randn(3, 24, LLM.width, generator=gen)
    rows, states, n_tokens = [], [], 0
    for i, (n_queries, first, n_again) in enumerate([(24, 0, 0), (16, 0, 0), (24, 4, 3)]):
        prefix = [1, *range(20, 20 + i)]
        chunks, state = serve(llm, queries[i, :n_queries], prefix, first, n_again)
        # A word for each chunk that wrote, ending 240 ms before it does.
        ends = [(first + c + 1) * CHUNK_QUERIES * QUERY_MS - 240 for c in range(len(chunks))]
        words = [(tokens, end) for tokens, end in zip(chunks, ends, strict=True) if tokens]
        rows.append(interleave(words, n_queries, CHUNK_QUERIES, 240, prefix, first, n_again))
        states.append(state)
        n_tokens += sum(map(len, chunks))
        assert len(rows[-1].items) == state.length.item()
    assert n_tokens > 10
    hidden = rows_hidden(llm, queries, rows)
    for i, (row, state) in enumerate(zip(rows, states, strict=True)):
        last = hidden[i, len(row.items) - 1]
        torch.testing.assert_close(last, state.hidden[0], atol=1e-4, rtol=0)
    llm.stop.weight.mul_(1000.0)  # every decision becomes a certain one, in the same sense
    text, stop, right = make_trainer(llm, corrupt_tokens=0.0).losses(queries, rows)
    assert right == 1.0
    assert stop.item() < 0.05
    wrong = [Row(r.items, r.text_at, r.text_ids, r.stop_at, [1 - s for s in r.stop]) for r in rows]
    assert make_trainer(llm, corrupt_tokens=0.0).losses(queries, wrong)[1].item() > 10.0


def rows_hidden(llm, queries, rows):
    """Rows (B, T) through the training forward, padded on the right."""
    longest = max(len(row.items) for row in rows)
    embeds = torch.zeros(len(rows), longest, LLM.width)
    for i, row in enumerate(rows):
        for j, (kind, value) in enumerate(row.items):
            embeds[i, j] = queries[i, value] if kind == "q" else llm.tokens.weight[value]
    return llm.forward_train(embeds)


def test_losses_know_right_from_wrong(llm):
    """By hand for one row: cross-entropy over its tokens, over its stop decisions, share right."""
    queries = torch.randn(2, 4, LLM.width, generator=torch.Generator().manual_seed(1))
    rows = [
        interleave([([40, 41], 0), ([42], 200)], 4, 2, 0, [1]),
        interleave([], 4, 2, 0, [1]),  # noise: only stops are taught
    ]
    text, stop, right = make_trainer(llm, corrupt_tokens=0.0).losses(queries, rows)
    hidden = rows_hidden(llm, queries, rows).double()
    logits = hidden[0, rows[0].text_at] @ llm.tokens.weight.double().T
    expected = -logits.log_softmax(dim=-1)[range(3), [40, 41, 42]].mean()
    assert text.item() == pytest.approx(expected.item(), rel=1e-4)
    assert right == pytest.approx(
        (logits.argmax(dim=-1) == torch.tensor([40, 41, 42])).double().mean()
    )
    p = (
        torch.cat([hidden[i, row.stop_at] for i, row in enumerate(rows)])
        @ llm.stop.weight[0].double()
    )
    target = torch.tensor([s for row in rows for s in row.stop]).double()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(p, target)
    assert stop.item() == pytest.approx(entropy.item(), rel=1e-4)


def test_a_batch_of_noise_has_no_text_to_learn(llm):
    text, stop, right = make_trainer(llm).losses(
        torch.zeros(1, 4, LLM.width), [interleave([], 4, 2, 0, [1])]
    )
    assert (text.item(), right) == (0.0, 0.0)
    assert stop.isfinite()


def test_corruption_changes_what_is_read_not_what_is_taught(llm):
    queries = torch.zeros(1, 40, LLM.width)
    row = interleave(spoken_words(range(0, 1800, 100)), 24, 4, 0, PREFIX)
    clean, noisy = (make_trainer(llm, corrupt_tokens=p) for p in (0.0, 1.0))
    seen = []
    embed = llm.embed
    for trainer in (clean, noisy):
        trainer.bridge.llm = SimpleNamespace(
            cfg=LLM,
            embed=lambda ids: seen.append(ids) or embed(ids),
            forward_train=llm.forward_train,
            logits=llm.logits,
        )
        trainer.losses(queries, [row])
    read = [value if kind == "t" else 0 for kind, value in row.items]
    assert seen[0][0, : len(read)].tolist() == read
    assert not seen[0][0, len(read) :].any(), "padding"
    changed = (seen[1] != seen[0])[0, : len(read)].tolist()
    assert not any(changed[:4])  # beginning and first tokens of the prefix stay
    is_text = [kind == "t" for kind, _ in row.items]
    assert not any(c and not t for c, t in zip(changed, is_text, strict=True))
    assert sum(changed[4:]) > 0.9 * sum(is_text[4:])


# --- rows ----------------------------------------------------------------------------------------


def seam_of(row, chunk_queries):
    """First query of a row, number of queries before its first decision."""
    queries = [(at, i) for at, (kind, i) in enumerate(row.items) if kind == "q"]
    before = [i for at, i in queries if at <= row.stop_at[0]]
    return queries[0][1], len(before) - chunk_queries


@pytest.mark.parametrize("delay_ms", [0, 240, 960])
@pytest.mark.parametrize("chunk", [8, 16, 32])
def test_rows_after_a_seam_teach_only_what_they_heard(chunk, delay_ms):
    """A row that begins later is primed with what was said and taught the rest.

    Words that ended less than the delay before the seam are still to be written: before the
    queries that hold them were given again, the LLM was taught to write words out of nothing.
    """
    rng = np.random.default_rng(0)
    trainer = make_trainer(None, p_seam=1.0)
    n_again_seen = set()
    for _ in range(200):
        ends = np.sort(rng.integers(0, 12_000, rng.integers(0, 25))).tolist()
        words = spoken_words(ends)
        row = trainer.make_row(words, 160, chunk, delay_ms)
        first, n_again = seam_of(row, chunk // 4)
        seam_ms = (first + n_again) * QUERY_MS
        assert seam_ms % (chunk * 20) == 0
        assert 0 < seam_ms < 160 * QUERY_MS / 2
        n_again_seen.add(n_again)
        assert n_again in (0, min(seam_ms, -(-delay_ms // QUERY_MS) * QUERY_MS) // QUERY_MS)
        said = [t for t, end in words if end + delay_ms <= seam_ms]
        rest = [i for t, end in words if end + delay_ms > seam_ms for i in t]
        n_prefix = [kind for kind, _ in row.items].index("q")
        bos, *context, newline = [i for _, i in row.items[:n_prefix]]
        assert (bos, newline) == (1, 10 + ord("\n") % 50)
        flat = [i for t in said for i in t]
        assert context == flat[len(flat) - len(context) :]
        assert bool(context) == bool(said)
        assert row.text_ids == rest[: len(row.text_ids)]
        heard_from_ms = first * QUERY_MS
        late = [end for t, end in words if t[0] in row.text_ids]
        assert all(end > heard_from_ms for end in late)
    assert {0, -(-delay_ms // QUERY_MS)} <= n_again_seen


def test_rows_without_a_seam_are_whole():
    trainer = make_trainer(None, p_seam=0.0)
    words = spoken_words(range(200, 6000, 400))
    row = trainer.make_row(words, 80, 16, 240)
    expected = interleave(words, 80, 4, 240, [1, 10 + ord("\n") % 50])
    assert row == expected


def test_words_are_placed_only_where_they_are_known():
    """A text that cannot be heard in its row is not taught; in noise there is nothing to say."""
    trainer = make_trainer(None)
    trainer.bridge.pieces = SimpleNamespace(encode=lambda word: [1 + ord(c) % 5 for c in word])
    said = [[Utterance(0, 1, "cat " * 9, "a")], []]
    rows = trainer.place_words(said, torch.zeros(2, 5, 6))
    assert rows == [None, []]


def test_blurred_posteriors_are_posteriors():
    """About the share of frames that was asked for, each still a distribution."""
    log_probs = torch.randn(4, 200, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    blurred = make_trainer(None, blur=0.25).blur(log_probs)
    torch.testing.assert_close(blurred.exp().sum(dim=-1), torch.ones(4, 200), atol=1e-5, rtol=0)
    changed = (blurred != log_probs).any(dim=-1).float().mean().item()
    assert changed == pytest.approx(0.25, abs=0.06)  # four standard deviations of 800 draws
    assert torch.equal(make_trainer(None, blur=0.0).blur(log_probs), log_probs)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("joint*.toml")), ids=lambda p: p.name)
def test_shipped_configs_can_be_read(path):
    cfg = load_config(path)
    assert cfg.sources
    assert all(64 % n == 0 and n % 4 == 0 for n in cfg.chunks)  # rows are whole chunks


# --- tasks and comparisons -----------------------------------------------------------------------


def question(*targets, at=16_000):
    return [Utterance(0, at * (i + 1), "so", "a", dict(t)) for i, t in enumerate(targets)]


def test_a_task_is_drawn_where_all_that_is_said_has_its_target():
    german = {"translate to de": "so ist es"}
    trainer = make_trainer(None, tasks=("transcribe", "translate to de", "answer"))
    drawn = {trainer.draw_task(question(german, german)) for _ in range(40)}
    assert drawn == {"transcribe", "translate to de"}
    assert trainer.draw_task(question(german, {})) == "transcribe"
    assert trainer.draw_task(question()) == "transcribe"  # noise: nothing is to be said in it
    only = make_trainer(None, tasks=("answer",))
    assert only.draw_task(question({"answer": "yes"})) == "answer"


def test_a_translation_is_due_when_the_utterance_is_over():
    trainer = make_trainer(None, tasks=("translate to de",), p_seam=0.0)
    stream = question({"translate to de": "so ist"}, {"translate to de": "ja"})
    words = trainer.place_target(stream, "translate to de", late_ms=0)
    encode = trainer.bridge.tokenizer.encode
    assert words == [(encode(" so"), 1000), (encode(" ist"), 1000), (encode(" ja"), 2000)]
    told = set()
    for _ in range(60):
        row = trainer.make_row(words, 40, 16, 240, "translate to de")
        n_prefix = [kind for kind, _ in row.items].index("q")
        told.add(tuple(i for _, i in row.items[1 : n_prefix - 1]))
    served = pipeline_prefix(trainer, "Translate into German:")
    assert tuple(served[1:-1]) in told
    assert len(told) == 4  # and three paraphrases


def pipeline_prefix(trainer, prompt):
    """What the engine puts before the audio of a stream with this prompt."""
    from sparqle_stream import stages

    return stages.prefix_ids(trainer.bridge.tokenizer, prompt)


def test_merged_queries_are_sums_in_the_place_of_the_last():
    words = spoken_words([100, 500, 900])
    row = interleave(words, 8, 4, 0, PREFIX)
    queries = torch.arange(8.0).view(1, 8, 1).repeat(1, 1, 2)
    half, (short,) = merged(queries, [row], 2)
    assert half[0, :, 0].tolist() == [1.0, 5.0, 9.0, 13.0]
    assert [value for kind, value in short.items if kind == "q"] == [0, 1, 2, 3]
    assert [x for x in short.items if x[0] == "t"] == [x for x in row.items if x[0] == "t"]
    assert [short.items[at + 1] for at in short.text_at] == [("t", i) for i in row.text_ids]
    assert (short.text_ids, short.stop) == (row.text_ids, row.stop)
    assert short.stop_at[-1] == len(short.items) - 1
    assert merged(queries, [row], 1) == (queries, [row])


def test_sinks_are_pauses_before_the_audio():
    row = make_trainer(None, p_seam=0.0, sinks=3).make_row([], 4, 16, 240)
    pause = [10 + ord(c) % 50 for c in " ..."]
    assert [i for kind, i in row.items if kind == "t"] == [1, 10 + ord("\n") % 50, *3 * pause]


def test_comparisons_are_no_models_to_serve():
    assert JointConfig("", "", "", ()).is_servable
    assert not JointConfig("", "", "", (), sinks=4).is_servable
    assert not JointConfig("", "", "", (), merge=2).is_servable
    with pytest.raises(ConfigError, match="whole groups of 4 queries"):
        JointConfig("", "", "", (), merge=4, chunks=(8, 16))
    with pytest.raises(ConfigError, match="update = 'lorra'"):
        JointConfig("", "", "", (), update="lorra")


@pytest.mark.parametrize(
    ("texts", "is_told"),
    [
        (["WE CALL IT BEAR", "i do not", "Yes."], True),
        (["We call it bear.", "i do not", "Yes."], False),
        ([""], False),
    ],
)
def test_a_pack_without_capitals_and_marks_is_told(tmp_path, caplog, texts, is_told):
    """LibriSpeech's transcripts would teach the LLM to write names small and no commas."""
    with PackWriter(tmp_path / "pack") as writer:
        for i, text in enumerate(texts):
            facts = {"speaker": "s", "corpus": "c", "licence": "l"}
            writer.add(np.zeros(800, np.int16), id=str(i), text=text, **facts)
    source = Source(str(tmp_path / "pack"))
    warn_of_plain((source, Source(source.pack, transcribed=False)))
    said = [f"{source.pack}: 2 of 3 transcripts have no capitals"] if is_told else []
    assert [record.message[: len(said[0])] for record in caplog.records] == said


def test_a_text_of_which_nothing_is_spelled_out_is_refused(tmp_path):
    """Sentences were drawn until there was a good one: for ever."""
    path = tmp_path / "text.txt"
    path.write_text("In 1984.\nThe café.\n--\n\n")
    with pytest.raises(ConfigError, match="none of the 4 lines"):
        joint.read_sentences(path)
    path.write_text("In 1984.\nSo it is.\n")
    assert joint.read_sentences(path) == ["So it is."]
