"""Reading other people's checkpoints: GGUF files into our LLM's names and our tokenizer.

Contract: a missing, unexpected or misshapen tensor is a ModelError that names it; nothing is
guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sparqle_stream.config import LlmConfig
from sparqle_stream.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer
    from torch import Tensor, nn

_GGUF_LAYER = {
    "attn_norm": "attn_norm",
    "attn_q": "attn.q_proj",
    "attn_k": "attn.k_proj",
    "attn_v": "attn.v_proj",
    "attn_output": "attn.o_proj",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_TOP = {"token_embd": "tokens", "output_norm": "norm"}
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type


class TextTokenizer:
    """Byte-level BPE: text -> ids and back, without special tokens of its own accord."""

    def __init__(self, tokenizer: Tokenizer, bos_id: int) -> None:
        self.bos_id = bos_id
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Bytes that are not UTF-8 (yet) come out as U+FFFD."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class GgufFile:
    """A Llama-family GGUF: `config()`, `state_dict()`, `tokenizer()`."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        try:
            self._reader = GGUFReader(path)
        except (ValueError, OSError, IndexError) as err:
            raise ModelError(f"cannot read {path} as GGUF: {err}", hint="pull it again") from err
        if (arch := self._field("general.architecture")) != "llama":
            raise ModelError(f"GGUF of architecture {arch!r}", hint="use a Llama-family model")

    def _field(self, key: str) -> Any:  # noqa: ANN401 - typed by the file
        field = self._reader.get_field(key)
        if field is None:
            raise ModelError(f"the GGUF has no {key}", hint="use a complete Llama-family GGUF")
        return field.contents()

    def config(self) -> LlmConfig:
        width = self._field("llama.embedding_length")
        n_heads = self._field("llama.attention.head_count")
        return LlmConfig(
            width=width,
            n_layers=self._field("llama.block_count"),
            n_heads=n_heads,
            n_kv_heads=self._field("llama.attention.head_count_kv"),
            head_width=width // n_heads,
            ffn=self._field("llama.feed_forward_length"),
            vocab=len(self._field("tokenizer.ggml.tokens")),
            rope_theta=self._field("llama.rope.freq_base"),
            rms_eps=self._field("llama.attention.layer_norm_rms_epsilon"),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Dequantised float32 tensors under our names; q and k rows back in half-split order."""
        from gguf import dequantize

        cfg = self.config()
        state = {}
        for tensor in self._reader.tensors:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            name = _our_name(tensor.name)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                # The converter stored each head's rotary pairs side by side.
                pairs = weight.view(-1, cfg.head_width // 2, 2, cfg.width)
                weight = pairs.transpose(1, 2).reshape(-1, cfg.width)
            state[name] = weight
        return state

    def tokenizer(self) -> TextTokenizer:
        """Byte-level BPE with digits taken one by one, as SmolLM was trained."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        kind = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre")
        if kind != ("gpt2", "smollm"):
            raise ModelError(
                f"GGUF tokenizer {kind} is not supported",
                hint="use a checkpoint folder with tokenizer.json",
            )
        names = self._field("tokenizer.ggml.tokens")
        merges = [tuple(pair.split(" ")) for pair in self._field("tokenizer.ggml.merges")]
        bpe = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges)
        tokenizer = tokenizers.Tokenizer(bpe)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        types = self._field("tokenizer.ggml.token_type")
        control = [n for n, kind in zip(names, types, strict=True) if kind == _CONTROL_TOKEN]
        tokenizer.add_special_tokens(
            [tokenizers.AddedToken(name, special=True, normalized=False) for name in control]
        )
        return TextTokenizer(tokenizer, bos_id=self._field("tokenizer.ggml.bos_token_id"))


def _our_name(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.attn.q_proj.weight; unknown names stay as they are."""
    match name.split("."):
        case ["blk", i, part, "weight"] if part in _GGUF_LAYER:
            return f"layers.{i}.{_GGUF_LAYER[part]}.weight"
        case [part, "weight"] if part in _GGUF_TOP:
            return f"{_GGUF_TOP[part]}.weight"
    return name


def load_into(
    module: nn.Module, state: dict[str, Tensor], *, optional: tuple[str, ...] = ()
) -> None:
    """Copy `state` into `module`; every name must fit but those that start with an `optional`."""
    own = module.state_dict()
    missing = [n for n in own if n not in state and not n.startswith(optional or ("\0",))]
    unexpected = [n for n in state if n not in own]
    misshapen = [
        f"{n} {tuple(state[n].shape)} instead of {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise ModelError(
            f"weights do not fit {type(module).__name__}: {'; '.join(problems)}",
            hint="use weights of the same architecture and config",
        )
    module.load_state_dict(state, strict=False)
