"""Reading checkpoints: GGUF files, checkpoint folders, Whisper encoders -> our names and shapes.

Contract: a missing, unexpected or misshapen tensor is a ModelError that names it; nothing is
guessed. Tensors come out in the precision that they are stored in, quantised ones in float32.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparqle_stream.config import EncoderConfig, LlmConfig
from sparqle_stream.config_json import config_from_json, read_json
from sparqle_stream.errors import ModelError
from sparqle_stream.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

OWN_CONFIG = "sparqle_llm.json"  # marks a folder that `save_llm` wrote
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
_GGUF_TOP = {"token_embd": "tokens", "output_norm": "norm", "output": "head"}
# transformers' Llama -> ours
_HF_RENAMES = {
    "model.": "",
    "embed_tokens": "tokens",
    "lm_head": "head",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.": "attn.",
}
# openai/whisper's encoder -> ours
_WHISPER_RENAMES = {"encoder.": "", ".attn.": ".", ".mlp.0.": ".fc1.", ".mlp.2.": ".fc2."}
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type


@dataclass(frozen=True, slots=True)
class LlmFiles:
    """What an LLM's files say, under our names."""

    cfg: LlmConfig
    state: dict[str, Tensor]
    tokenizer: TextTokenizer


class GgufFile:
    """A Llama-family GGUF: `config()`, `state_dict()`, `tokenizer()`."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._path = path
        try:
            self._reader = GGUFReader(path)
        except (ValueError, OSError, IndexError) as err:
            raise ModelError(f"cannot read {path} as GGUF: {err}", hint="pull it again") from err
        if (arch := self._field("general.architecture")) != "llama":
            raise ModelError(f"GGUF of architecture {arch!r}", hint="use a Llama-family model")
        if self._reader.get_field("llama.rope.scaling.type") or self._reader.get_field(
            "llama.expert_count"
        ):
            raise ModelError(
                f"{path} has scaled positions or experts", hint="use a plain Llama-family model"
            )

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
        """SmolLM's is made here, others by transformers."""
        bos_id = self._field("tokenizer.ggml.bos_token_id")
        if self._reader.get_field("tokenizer.ggml.pre") is not None:
            kind = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre")
            if kind == ("gpt2", "smollm"):
                return TextTokenizer(self._smollm_tokenizer(), bos_id)
        from transformers import AutoTokenizer

        folder, file = str(self._path.parent), self._path.name
        fast = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        return TextTokenizer(fast.backend_tokenizer, bos_id)

    def _smollm_tokenizer(self) -> Tokenizer:
        """Byte-level BPE that takes digits one by one, as SmolLM was trained."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

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
        return tokenizer


def _our_name(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.attn.q_proj.weight; unknown names stay as they are."""
    match name.split("."):
        case ["blk", i, part, "weight"] if part in _GGUF_LAYER:
            return f"layers.{i}.{_GGUF_LAYER[part]}.weight"
        case [part, "weight"] if part in _GGUF_TOP:
            return f"{_GGUF_TOP[part]}.weight"
    return name


def read_llm(source: str | Path) -> LlmFiles:
    """An LLM from a folder that we wrote, a GGUF file, or anything else through transformers."""
    path = Path(source)
    if (path / OWN_CONFIG).is_file():
        return _read_own(path)
    if path.suffix == ".gguf":
        file = GgufFile(path)
        return LlmFiles(file.config(), file.state_dict(), file.tokenizer())
    return _read_with_transformers(str(source))


def save_llm(files: LlmFiles, folder: Path) -> None:
    """Writes what `read_llm` reads fastest: float16 (weights lie far from its limits), no GGUF."""
    from safetensors.torch import save_file

    config = {"bos_id": files.tokenizer.bos_id, "llm": asdict(files.cfg)}
    (folder / OWN_CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    files.tokenizer.save(folder / "tokenizer.json")
    state = {name: tensor.half().contiguous() for name, tensor in files.state.items()}
    save_file(state, folder / "model.safetensors")


def _read_own(folder: Path) -> LlmFiles:
    config = read_json(folder / OWN_CONFIG)
    if lacking := {"llm", "bos_id"} - config.keys():
        raise ModelError(f"{folder / OWN_CONFIG} has no {min(lacking)}", hint="pull it again")
    return LlmFiles(
        config_from_json(LlmConfig, config["llm"], folder / OWN_CONFIG),
        read_safetensors(folder / "model.safetensors"),
        TextTokenizer.load(folder / "tokenizer.json", config["bos_id"]),
    )


def _read_with_transformers(source: str) -> LlmFiles:
    """A Llama-family checkpoint: folder or hub name."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source)
        rope = config.get_text_config().rope_parameters
        if config.model_type != "llama" or rope["rope_type"] != "default":
            raise ModelError(
                f"{source} is a {config.model_type} model with {rope['rope_type']} positions",
                hint="use a Llama-family model with plain rotary positions",
            )
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, AttributeError) as err:
        first_line = str(err).strip().partition("\n")[0]
        raise ModelError(
            f"cannot read {source} as an LLM: {first_line}",
            hint="give a folder with config.json, tokenizer.json and safetensors, or a .gguf file",
        ) from err
    state = {_renamed(name, _HF_RENAMES): value for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("head.weight", None)
    cfg = LlmConfig(
        width=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_width=config.head_dim,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        rope_theta=rope["rope_theta"],
        rms_eps=config.rms_norm_eps,
    )
    bos_id = next(i for i in (tokenizer.bos_token_id, config.bos_token_id, 0) if i is not None)
    return LlmFiles(cfg, state, TextTokenizer(tokenizer.backend_tokenizer, bos_id))


def import_whisper(path: Path) -> dict[str, Tensor]:
    """A Whisper encoder under openai's names -> the state of our `Encoder`, float32.

    Positions are computed by our encoder; stored ones must be the same sinusoids.
    """
    from sparqle_stream.encoder import sinusoids

    stored = read_safetensors(path)
    state = {
        _renamed(name, _WHISPER_RENAMES): tensor.float()
        for name, tensor in stored.items()
        if name.startswith("encoder.")
    }
    positions = state.pop("positional_embedding", None)
    if positions is not None:
        error = (positions - sinusoids(*positions.shape)).abs().max()
        if float(error) > 1e-2:  # fp16 keeps 3 digits
            raise ModelError(
                f"{path}: positions are not Whisper's sinusoids", hint="use a Whisper encoder"
            )
    return state


def whisper_config(state: dict[str, Tensor]) -> EncoderConfig:
    """The shape of an encoder that `import_whisper` read; heads are 64 wide in every Whisper."""
    width, n_mels, _ = state["conv1.weight"].shape
    n_layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return EncoderConfig(n_mels=n_mels, width=width, n_heads=width // 64, n_layers=n_layers)


def merge_lora(state: dict[str, Tensor], lora: dict[str, Tensor], scale: float) -> None:
    """W += scale * B A for adapters '<matrix>.a' (r, in) with '<matrix>.b' (out, r).

    Summed in float32; W keeps its dtype, so that a half-precision LLM needs no second size.
    """
    for name in sorted({key.rpartition(".")[0] for key in lora}):
        weight, a, b = state.get(f"{name}.weight"), lora.get(f"{name}.a"), lora.get(f"{name}.b")
        if weight is None or a is None or b is None or weight.shape != (len(b), a.shape[1]):
            raise ModelError(
                f"the adapter of {name} does not fit the LLM",
                hint="use the LLM that the bridge was trained with",
            )
        merged = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
        state[f"{name}.weight"] = merged.to(weight.dtype)


SCALE = ".scale"  # of a matrix in int8, (out,)


def in_eight_bits(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices (out, ...) as int8 with a scale for each output; `expanded` undoes it."""
    out = {}
    for name, weight in state.items():
        if weight.ndim < 2:
            out[name] = weight
            continue
        rows = weight.float().flatten(1)
        scale = rows.abs().amax(dim=1).clamp(min=1e-12) / 127.0
        out[name] = (rows / scale[:, None]).round().to(torch.int8).view(weight.shape)
        out[name + SCALE] = scale
    return out


def expanded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with what is in int8 in float32; all others stay as they are."""
    out = {name: value for name, value in state.items() if not name.endswith(SCALE)}
    for name in [n for n in state if n.endswith(SCALE)]:
        matrix = name.removesuffix(SCALE)
        scale = state[name].view(-1, *[1] * (state[matrix].ndim - 1))
        out[matrix] = state[matrix].float() * scale
    return out


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors as they are stored."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as err:
        raise ModelError(f"cannot read {path}: {err}", hint="fetch or export it anew") from err


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Tensors below 'name.', without it."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _renamed(name: str, renames: dict[str, str]) -> str:
    for theirs, ours in renames.items():
        name = name.replace(theirs, ours)
    return name


def load_into(module: nn.Module, state: dict[str, Tensor], *, assign: bool = False) -> None:
    """`state` into `module`; every name and shape must fit. `assign`: take over the tensors."""
    own = module.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "wrong shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    told = [
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"
        for what, names in problems.items()
        if names
    ]
    if told:
        raise ModelError(
            f"weights do not fit {type(module).__name__}; {'; '.join(told)}",
            hint="use weights of the same architecture and config",
        )
    module.load_state_dict(state, assign=assign)
