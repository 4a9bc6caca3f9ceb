"""weights.py: imports against independent implementations (transformers) with the same weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_artifacts import tiny_gguf

from sparqle_stream import artifacts, encoder, weights
from sparqle_stream.config import EncoderConfig
from sparqle_stream.errors import ModelError
from sparqle_stream.torch_model import load_llm

IDS = [[1, 20, 31, 7, 90, 90, 3, 55, 41, 12]]
TOLERANCE = 2e-5  # float32, a few layers, another order of the same sums


def llama(tied=True, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5_000.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<s>")


def logits(model, ids):
    with torch.inference_mode():
        return model.logits(model.forward_train(model.embed(torch.tensor(ids))))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_a_checkpoint_folder_gives_transformers_logits(tmp_path, tokenizer, tied):
    theirs = llama(tied)
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours, text = load_llm(tmp_path)
    assert (ours.head is None) == tied
    assert text.encode("a b") == [1, 2]
    assert text.bos_id == 0
    with torch.inference_mode():
        expected = theirs(torch.tensor(IDS)).logits
    torch.testing.assert_close(logits(ours, IDS), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert float(expected.std()) > 0.5, "logits that say nothing prove nothing"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": True}, r"unexpected: layers\.0\.attn\.q_proj\.bias"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "linear positions",
        ),
    ],
    ids=["biases", "scaled positions"],
)
def test_what_our_llm_cannot_compute_is_refused(tmp_path, tokenizer, changes, said):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 10}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, **changes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        load_llm(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="as an LLM"):
        load_llm(tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GARBAGE" * 100)
    with pytest.raises(ModelError, match="as GGUF"):
        load_llm(file)


def transformers_gguf(file):
    pytest.importorskip("accelerate", reason="transformers reads GGUF only with accelerate")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


def test_a_gguf_gives_transformers_logits(tmp_path):
    """Dequantisation and the undone permutation of q and k, on a small file."""
    file = tmp_path / "tiny.gguf"
    tiny_gguf(file)
    ours, _ = load_llm(file)
    with torch.inference_mode():
        expected = transformers_gguf(file)(torch.tensor(IDS)).logits
    torch.testing.assert_close(logits(ours, IDS), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture(scope="session")
def pulled():
    try:
        return artifacts.path(artifacts.DEFAULT_LLM)
    except ModelError as err:
        pytest.skip(f"the LLM is not here: {err}")


TEXT = "The ship left on a Tuesday, so nobody saw it go. It's over now: 12 of 30 stayed."


@pytest.mark.slow
def test_the_default_llm_gives_transformers_logits(pulled):
    """The GGUF as transformers reads it against what `models pull` made of it (float16)."""
    from transformers import AutoTokenizer

    file = next(pulled.glob("*.gguf"))
    theirs = AutoTokenizer.from_pretrained(pulled, gguf_file=file.name)
    ours, text = load_llm()
    ids = [text.bos_id, *text.encode("\n" + TEXT)]
    assert ids[1:] == theirs.encode("\n" + TEXT, add_special_tokens=False)
    assert text.decode(ids[2:]) == TEXT
    with torch.inference_mode():
        expected = transformers_gguf(file)(torch.tensor([ids])).logits
    got = logits(ours, [ids])
    assert bool((got.argmax(-1) == expected.argmax(-1)).all())
    # 30 layers of weights that were rounded to 11 bits; logits reach 30
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.0)
    chosen = got[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])
    assert float(-chosen.mean()) < 5.5, "English surprises it less than half as much as chance"


def test_the_default_llm_takes_digits_one_by_one(pulled):
    """SmolLM was trained so."""
    text = weights.read_llm(pulled).tokenizer
    assert len(text.encode("2026")) == 4
    assert text.decode(text.encode("In 2026, 17 ships.")) == "In 2026, 17 ships."


# --- Whisper --------------------------------------------------------------------------------------


def whisper(width=64, n_layers=2):
    """transformers' encoder, random, and its weights under openai's names."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(1)
    config = WhisperConfig(
        d_model=width,
        encoder_layers=n_layers,
        encoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        num_mel_bins=80,
        max_source_positions=100,
        init_std=0.15,
    )
    theirs = WhisperEncoder(config).eval()
    return theirs, {f"encoder.{openai_name(k)}": v for k, v in theirs.state_dict().items()}


def openai_name(name):
    for theirs, openai in (
        ("layers.", "blocks."),
        ("self_attn_layer_norm", "attn_ln"),
        ("final_layer_norm", "mlp_ln"),
        ("self_attn.q_proj", "attn.query"),
        ("self_attn.k_proj", "attn.key"),
        ("self_attn.v_proj", "attn.value"),
        ("self_attn.out_proj", "attn.out"),
        ("fc1", "mlp.0"),
        ("fc2", "mlp.2"),
        ("embed_positions.weight", "positional_embedding"),
    ):
        name = name.replace(theirs, openai)
    return name.replace("layer_norm.", "ln_post.") if name.startswith("layer_norm.") else name


def compare_with_transformers(theirs, file):
    """Stem away from the padding, then all blocks on the same input."""
    state = weights.import_whisper(file)
    cfg = weights.whisper_config(state)
    ours = encoder.Encoder(cfg).eval()
    weights.load_into(ours, state)
    n_frames = theirs.config.max_source_positions
    mel = torch.randn(1, 2 * n_frames, 80, generator=torch.Generator().manual_seed(0)) * 0.5
    with torch.inference_mode():
        # Whisper centres its window; ours looks back only, and says the same one frame later.
        padded = torch.nn.functional.pad(mel, (0, 0, encoder.MEL_TAIL + 1, 0))[:, :-1]
        got = ours.stem(padded, torch.tensor([-1]))
        stem = torch.nn.functional.gelu(theirs.conv1(mel.transpose(1, 2)))
        stem = torch.nn.functional.gelu(theirs.conv2(stem)).transpose(1, 2)
        stem = stem + theirs.embed_positions.weight
        # the first frame sees the padding; stored positions may be fp16
        torch.testing.assert_close(got[:, 2:], stem[:, 1:-1], atol=6e-4, rtol=1e-4)
        # the blocks, on transformers' stem
        expected = theirs(mel.transpose(1, 2)).last_hidden_state
        x = stem
        for block in ours.blocks:
            q, k, v = block.qkv(x)
            x = block.merge(x, torch.nn.functional.scaled_dot_product_attention(q, k, v))
        torch.testing.assert_close(ours.ln_post(x), expected, atol=1e-3, rtol=1e-3)
    return cfg


def test_whisper_import_gives_transformers_frames(tmp_path):
    theirs, named = whisper()
    save_file(named, tmp_path / "whisper.safetensors")
    cfg = compare_with_transformers(theirs, tmp_path / "whisper.safetensors")
    assert cfg == EncoderConfig(width=64, n_heads=1, n_layers=2)


def test_whisper_with_other_positions_is_refused(tmp_path):
    _, named = whisper(n_layers=1)
    named["encoder.positional_embedding"] = named["encoder.positional_embedding"].roll(1, 0)
    save_file({k: v.contiguous() for k, v in named.items()}, tmp_path / "whisper.safetensors")
    with pytest.raises(ModelError, match="sinusoids"):
        weights.import_whisper(tmp_path / "whisper.safetensors")


@pytest.mark.slow
def test_the_real_whisper_base_gives_transformers_frames(shared_data):
    """The starting weights, where they are beside the checkout."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    file = shared_data.parent / "weights" / "whisper_base_encoder_fp16.safetensors"
    if not file.is_file():
        pytest.skip("no starting weights beside the checkout")
    config = WhisperConfig(
        d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048
    )
    theirs = WhisperEncoder(config).eval()
    stored = weights.read_safetensors(file)
    names = {f"encoder.{openai_name(k)}": k for k in theirs.state_dict()}
    theirs.load_state_dict({names[k]: v.float() for k, v in stored.items()})
    assert compare_with_transformers(theirs, file) == EncoderConfig()


# --- names and shapes -----------------------------------------------------------------------------


def test_every_misfit_is_named():
    module = torch.nn.Linear(3, 2)
    with pytest.raises(ModelError) as caught:
        weights.load_into(module, {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)})
    said = caught.value.message
    assert "missing: bias" in said
    assert "unexpected: scale" in said
    assert "weight (2, 4) instead of (2, 3)" in said


def test_lora_is_added_to_its_matrix():
    gen = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(s, generator=gen) for s in ((4, 6), (2, 6), (4, 2)))
    state = {"layers.0.attn.q_proj.weight": w.clone(), "norm.weight": torch.ones(6)}
    adapters = {"layers.0.attn.q_proj.a": a, "layers.0.attn.q_proj.b": b}
    weights.merge_lora(state, adapters, scale=0.5)
    torch.testing.assert_close(state["layers.0.attn.q_proj.weight"], w + 0.5 * b @ a)
    assert torch.equal(state["norm.weight"], torch.ones(6))


@pytest.mark.parametrize("case", ["no matrix", "half an adapter", "wrong width"])
def test_a_foreign_adapter_is_refused(case):
    state = {"layers.0.attn.q_proj.weight": torch.zeros(4, 6)}
    lora = {
        "layers.0.attn.q_proj.a": torch.zeros(2, 6),
        "layers.0.attn.q_proj.b": torch.zeros(4, 2),
    }
    if case == "no matrix":
        state = {}
    elif case == "half an adapter":
        del lora["layers.0.attn.q_proj.b"]
    else:
        lora["layers.0.attn.q_proj.a"] = torch.zeros(2, 5)
    with pytest.raises(ModelError, match=r"adapter of layers\.0\.attn\.q_proj"):
        weights.merge_lora(state, lora, scale=1.0)
