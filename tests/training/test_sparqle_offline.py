"""training.sparqle: SparQLe's checkpoint with HuBERT or Whisper and an LLM, all of them tiny."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from sparqle_stream.errors import ModelError
from sparqle_stream.sparqle import SparqleBridge, SparqleShape
from training import sparqle as offline

PCM = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A Llama of one layer over letters, saved as transformers saves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llm")
    letters = {chr(c): i for i, c in enumerate(range(32, 127))} | {"<s>": 95, "</s>": 96}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    cfg = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=95,
        eos_token_id=96,
    )
    LlamaForCausalLM(cfg).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    folder = tmp_path_factory.mktemp("hubert")
    cfg = HubertConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    HubertModel(cfg).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    folder = tmp_path_factory.mktemp("whisper")
    small = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 24, "vocab_size": 60}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1)
    cfg = WhisperConfig(**small, **heads, **tokens, decoder_start_token_id=1)
    WhisperModel(cfg).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(1)
    bridge = SparqleBridge(SparqleShape(6, 64, 2, 48, 24, 32, (0,)))
    torch.nn.init.normal_(bridge.query_tokens)
    torch.save({"model": bridge.state_dict()}, tmp_path / "SparQLe_last.pt")
    return tmp_path / "SparQLe_last.pt"


@pytest.mark.parametrize(("encoder", "n_frames"), [("hubert", 49), ("whisper", 50)])
def test_speech_becomes_text(checkpoint, llm, encoder, n_frames, request):
    """Deterministic text that hangs on the audio; a second of it is 50 frames, not 30 s."""
    preset = offline.load(checkpoint, request.getfixturevalue(encoder), llm)
    assert preset.listen(PCM).shape == (1, n_frames, 24)
    text = preset.write(PCM, "Transcribe the speech.", n_most=8)
    assert text == preset.write(PCM, "Transcribe the speech.", n_most=8)
    assert preset.bridge(preset.listen(PCM)).shape == (1, 6, 32)
    assert not torch.allclose(
        preset.bridge(preset.listen(PCM)), preset.bridge(preset.listen(PCM[::-1].copy()))
    )
    before, after = preset.prompt("Do it.")
    assert (before, after) == ("<s><Speech>", "</Speech> Do it.\n")
    preset.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    assert preset.prompt("Do it.") == ("[<Speech>", "</Speech> Do it.]>")


def test_parts_that_do_not_fit_are_told(checkpoint, llm, hubert):
    with pytest.raises(ModelError, match=r"is a llama model"):
        offline.load(checkpoint, llm, llm)
    with pytest.raises(ModelError, match="cannot load encoder or LLM"):
        offline.load(checkpoint, hubert, str(checkpoint.parent))
    state = torch.load(checkpoint, weights_only=True)["model"]
    state["llm_proj.weight"], state["llm_proj.bias"] = torch.zeros(40, 64), torch.zeros(40)
    torch.save(state, checkpoint)
    with pytest.raises(ModelError, match="with an llm of width 40, this has 32"):
        offline.load(checkpoint, hubert, llm)


def test_the_names_in_a_checkpoint_can_be_listed(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparqle", str(checkpoint), "--keys"])
    offline.main()
    assert capsys.readouterr().out.splitlines()[0].endswith("tensors used")
    monkeypatch.setattr(sys, "argv", ["sparqle", str(checkpoint)])
    with pytest.raises(SystemExit):
        offline.main()
    assert "the LLM is not in the checkpoint" in capsys.readouterr().err
