"""Prefix tuning: the LLM learns to judge speech as plain text (Li and Liang, 2021).

Trained are K and V of P places that stand before the text in every layer, and a bias for each token
of the spoken vocabulary. The LLM stays as it is, the bridge's adapters merged into it; or these
learn too, and pay for what changes in captions (`[captions]`, training.captions). The loss is that
of the next token among the spoken vocabulary alone. A row is a piece of sentences that stand one
after another, each of them the beginning and then " " + spoken(sentence). At first the places are
K and V of P tokens of the texts, as the LLM reads them, or those of an older prefix.

The spoken vocabulary: all tokens of the first 100 000 sentences of each text and of all dev texts,
those that single letters are written with, and the beginning, which says that a sentence is over.
Other tokens are read in the texts that are trained on, but not asked for.

`python -m training.prefix CONFIG.toml --work DIR [--resume]` makes prefix.safetensors, which is
`--text` of training.export: text.k and text.v (L, KV, P, d) in bf16, keys rotated, so that text
begins at position P; text.ids (U,) int32, the sorted vocabulary; text.bias (U,) float32; and, if
they learned, the adapters (lora.*), which are the bridge's from then on.
"""

from __future__ import annotations

import math
import random
import string
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from sparqle_stream.artifacts import DEFAULT_LLM
from sparqle_stream.errors import ConfigError
from sparqle_stream.judge import TextPrefix
from sparqle_stream.llm import Llm, masked_attention, rope_table
from sparqle_stream.torch_model import load_llm
from sparqle_stream.weights import load_into, merge_lora, part, read_safetensors
from training import joint
from training.bridge import load_config as load_joint
from training.captions import CaptionsConfig, change, hear_captions
from training.corpus import Pack
from training.loop import Run, main, warmed
from training.lora import LORA_SCALE, adapter_weights, lent, load_adapters
from training.place import HERE, Place, find_place
from training.settings import read_config
from training.sources import SHARE_SEED, Feed
from training.text import is_spelled_out, spoken

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparqle_stream.tokenizer import TextTokenizer
    from training.captions import Caption
    from training.data import StreamSampler
    from training.lora import LoraLinear

COUNTED = 100_000  # sentences of each text whose tokens make the spoken vocabulary
DEV_ROWS = 32  # sentences of about the same length that are scored together
NOT_SPOKEN = -100  # number of a token outside the spoken vocabulary: no target
NEW_BIAS = -1.0  # of a token that the spoken vocabulary of `init` did not have


@dataclass(frozen=True, slots=True)
class Text:
    """A file with a sentence a line, or a pack, whose transcripts are read."""

    path: str
    weight: float = 1.0  # share of the sentences that are drawn from it, beside the others'
    share: float = 1.0  # of its sentences, evenly spread


@dataclass(frozen=True, slots=True)
class PrefixConfig:
    texts: tuple[Text, ...]
    dev: tuple[Text, ...] = ()  # perplexity a word of each goes into the log; weights say nothing
    dev_every: int = 100  # steps
    bridge: str = ""  # bridge.safetensors whose adapters the LLM will have; none: the plain LLM
    lora_scale: float = LORA_SCALE
    llm: str = DEFAULT_LLM
    n_places: int = 64  # of a prefix without `init`
    steps: int = 600
    rows: int = 16
    row_length: int = 128  # tokens
    lr: float = 1e-2
    warmup: int = 20
    ema: float = 0.99
    seed: int = 0
    bf16: bool | None = None  # None: where it is faster, which it is not on a CPU without AMX
    accumulate: int = 1  # shares of a batch, of `rows` each
    init: str = ""  # prefix.safetensors to go on from
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)  # its joint's LLM, if any

    def __post_init__(self) -> None:
        if not self.texts:
            raise ConfigError("there are no texts", hint="give [[texts]] in the config")
        if self.bridge and self.captions.joint:
            raise ConfigError(
                "both bridge and captions.joint say where adapters are", hint="leave bridge out"
            )
        for name in ("n_places", "rows", "row_length", "dev_every", "warmup"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}", hint="1 or more")
        for text in (*self.texts, *self.dev):
            if not (text.weight > 0 and 0 < text.share <= 1):
                raise ConfigError(
                    f"weight = {text.weight}, share = {text.share} of {text.path}",
                    hint="both above 0, share at most 1",
                )
        if len({dev_name(text) for text in self.dev}) < len(self.dev):
            raise ConfigError("two dev texts have the same name", hint="rename one of the files")


def dev_name(text: Text) -> str:
    return Path(text.path).stem


def read_sentences(text: Text) -> list[str]:
    """What is said in a text, as `spoken` spells it; sentences that are not spelled out are left.

    Raises ConfigError where no sentence remains, OSError for a file that cannot be read.
    """
    path = Path(text.path)
    if path.is_dir():
        lines = [clip.text for clip in Pack(path).clips]
    else:
        lines = path.read_text(errors="replace").splitlines()
    found = [said for line in lines if is_spelled_out(line) and (said := spoken(line))]
    if not found:
        raise ConfigError(
            f"{path} has no sentence to learn from", hint="one a line, numbers spelled out"
        )
    n = max(1, round(len(found) * text.share))
    return [found[i * len(found) // n] for i in range(n)]


def encode(tokenizer: TextTokenizer, sentence: str) -> list[int]:
    """The beginning and the sentence's tokens."""
    return [tokenizer.bos_id, *tokenizer.encode(" " + sentence)]


def spoken_vocabulary(tokenizer: TextTokenizer, sentences: Iterable[str]) -> Tensor:
    """Sorted ids (U,) int64 of all tokens of `sentences`, of single letters, and the beginning."""
    used = set[int]()
    for letter in string.ascii_lowercase:
        used.update(tokenizer.encode(letter))
        used.update(encode(tokenizer, letter))
    for sentence in sentences:
        used.update(encode(tokenizer, sentence))
    return torch.tensor(sorted(used))


def load_merged(cfg: PrefixConfig) -> tuple[Llm, TextTokenizer]:
    """The frozen LLM in float32 as the engine has it with the config's bridge, and its tokenizer.

    Raises ModelError for a bridge that does not fit the LLM.
    """
    llm, tokenizer = load_llm(cfg.llm)
    if cfg.bridge:
        bridge = read_safetensors(Path(cfg.bridge))
        whole = {name: weight.float() for name, weight in part(bridge, "llm").items()}
        state = llm.state_dict() | whole  # of an LLM that was updated as a whole
        merge_lora(state, part(bridge, "lora"), cfg.lora_scale)
        load_into(llm, state)
    return llm.requires_grad_(False), tokenizer


# --- the LLM behind a prefix ---------------------------------------------------------------------


def read(llm: Llm, ids: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Token ids (B, T) behind P places, k (rotated) and v (L, KV, P, d); P may be 0.

    Returns final-normed hidden (B, T, E), and each layer's own k and v (B, KV, T, d). Shorter rows
    are padded on the right, as in `Llm.forward_train`.
    """
    cfg, n_places, length = llm.cfg, k.shape[2], ids.shape[1]
    x = llm.embed(ids)
    rotation = rope_table(cfg.rope_theta, cfg.head_width, n_places + length, ids.device)
    cos, sin = (table[n_places:].to(x.dtype) for table in rotation)
    mask = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
    mask = F.pad(mask, (n_places, 0)).repeat(cfg.n_heads // cfg.n_kv_heads, 1)
    own = []
    k, v = (side.to(x.dtype)[:, None].expand(-1, len(ids), -1, -1, -1) for side in (k, v))
    for layer, k_before, v_before in zip(llm.blocks(), k, v, strict=True):
        q, k_own, v_own = layer.attn.project(layer.attn_norm(x), cos, sin)
        own.append((k_own, v_own))
        keys, values = torch.cat([k_before, k_own], dim=2), torch.cat([v_before, v_own], dim=2)
        x = layer.feed_forward(x + layer.attn.merge(masked_attention(q, keys, values, mask)))
    return llm.norm(x), own


@torch.no_grad()
def places_of(llm: Llm, ids: Tensor) -> tuple[Tensor, Tensor]:
    """K and V (L, KV, P, d), float32, of tokens (P,) that the LLM reads with nothing before."""
    cfg = llm.cfg
    nothing = torch.zeros(cfg.n_layers, cfg.n_kv_heads, 0, cfg.head_width, device=ids.device)
    _, own = read(llm, ids[None], nothing, nothing)
    k, v = (torch.cat(side).float() for side in zip(*own, strict=True))
    return k, v


class Prefix(nn.Module):
    """What is trained: k and v (L, KV, P, d), and a bias (U,) of the spoken vocabulary."""

    def __init__(self, k: Tensor, v: Tensor, n_spoken: int) -> None:
        super().__init__()
        self.k, self.v = nn.Parameter(k), nn.Parameter(v)
        self.bias = nn.Parameter(torch.zeros(n_spoken))


# --- the run -------------------------------------------------------------------------------------


class Trainer(Run):
    """A prefix for rows of sentences. What a step reads depends on the seed and its number alone:
    a run that was interrupted ends with the weights of one that was not."""

    name, result, shown = "prefix", "prefix.safetensors", ("loss",)

    def __init__(self, cfg: PrefixConfig, place: Place = HERE) -> None:
        super().__init__(cfg.steps, cfg.ema, cfg.accumulate, place)
        self.cfg = cfg
        self.texts = [read_sentences(text) for text in cfg.texts]
        self.dev = {dev_name(text): read_sentences(text) for text in cfg.dev}
        self._take_llm()
        counted = [islice(text, COUNTED) for text in self.texts]
        sentences = (one for text in (*counted, *self.dev.values()) for one in text)
        self.ids = spoken_vocabulary(self.tokenizer, sentences)
        self.number = torch.full((self.llm.cfg.vocab,), NOT_SPOKEN)  # of a token in the vocabulary
        self.number[self.ids] = torch.arange(len(self.ids))
        llm = self.llm
        head = cast("nn.Linear | nn.Embedding", llm.tokens if llm.head is None else llm.head)
        self.head = head.weight[self.ids.to(place.device)]  # (U, E)
        self.prefix = self._begin().to(place.device)
        groups = [{"params": list(self.prefix.parameters()), "peak": cfg.lr}]
        if self.adapters:
            learned = [p for adapter in self.adapters.values() for p in (adapter.a, adapter.b)]
            groups.append({"params": learned, "peak": cfg.captions.lr})
        self.ready([group | {"weight_decay": 0.0} for group in groups])

    def _take_llm(self) -> None:
        """The LLM, frozen but for adapters that learn too, and captions that these shall keep."""
        cfg, place = self.cfg, self.place
        self.adapters: dict[str, LoraLinear] = {}
        self.captions: list[Caption] = []
        if not cfg.captions.joint:
            llm, self.tokenizer = load_merged(cfg)
            self.llm = llm.to(place.device, torch.bfloat16 if place.bf16 else torch.float32)
            return
        teacher = joint.Trainer(load_joint(Path(cfg.captions.joint)), place)
        bridge = teacher.bridge
        if not bridge.adapters:
            raise ConfigError(
                f"{cfg.captions.joint} has no adapters that could learn", hint='update = "lora"'
            )
        self.llm, self.tokenizer, self.adapters = bridge.llm, bridge.tokenizer, bridge.adapters
        self.captions = hear_captions(teacher, cfg.captions.rows)

    def _begin(self) -> Prefix:
        """The prefix of the config, or one of tokens of the texts."""
        cfg, n_spoken = self.cfg, len(self.ids)
        if not cfg.init:
            first = torch.tensor(self.draw(cfg.n_places, random.Random(cfg.seed)))
            return Prefix(*places_of(self.llm, first.to(self.place.device)), n_spoken)
        before = TextPrefix.of(part(read_safetensors(Path(cfg.init)), "text"), self.llm.cfg)
        if before is None:
            raise ConfigError(f"{cfg.init} is no prefix", hint="give one of training.prefix")
        found, is_known = Prefix(before.k, before.v, n_spoken), torch.isin(self.ids, before.ids)
        found.bias.data = before.bias[self.ids].where(is_known, NEW_BIAS)
        return found

    def weights(self) -> dict[str, Tensor]:
        prefix = {f"text.{name}": p.detach() for name, p in self.prefix.named_parameters()}
        return prefix | adapter_weights(self.adapters)

    def load(self, weights: dict[str, Tensor]) -> None:
        load_into(self.prefix, part(weights, "text"))
        load_adapters(self.adapters, weights)

    def stored(self) -> dict[str, Tensor]:
        """The averaged prefix as the engine reads it, with its vocabulary."""
        stored = super().stored()
        stored = {k: v if k == "text.bias" else v.bfloat16() for k, v in stored.items()}
        return stored | {"text.ids": self.ids.int()}

    def make_feed(self, share: int) -> Feed:
        seed = self.cfg.seed + 1 + self.step + SHARE_SEED * share
        no_audio = cast("StreamSampler", None)
        return Feed(random.Random(seed), no_audio, iter(()))

    def warm_up(self, group: int) -> float:
        return warmed(self.step + 1, self.cfg.warmup)

    def draw(self, n: int, rng: random.Random) -> list[int]:
        """n tokens of sentences that are drawn by the weights of their texts; the last is cut."""
        weights = [text.weight for text in self.cfg.texts]
        ids: list[int] = []
        while len(ids) < n:
            ids += encode(self.tokenizer, rng.choice(rng.choices(self.texts, weights)[0]))
        return ids[:n]

    def nats(self, prefix: Mapping[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        """The sum of -log p of `targets` behind `ids`, both (B, T); targets are numbers in the
        spoken vocabulary, or NOT_SPOKEN. `prefix` has k, v and bias."""
        device = self.place.device
        hidden, _ = read(self.llm, ids.to(device), prefix["k"], prefix["v"])
        logits = F.linear(hidden, self.head).float() + prefix["bias"]
        flat = targets.flatten().to(device)
        return F.cross_entropy(logits.flatten(0, 1), flat, ignore_index=NOT_SPOKEN, reduction="sum")

    def batch_loss(self) -> tuple[Tensor, dict[str, float]]:
        """The loss is in nats a token."""
        cfg = self.cfg
        drawn = self.draw(cfg.rows * (cfg.row_length + 1), self.rng)
        rows = torch.tensor(drawn).view(cfg.rows, -1)
        targets = self.number[rows[:, 1:]]
        n_asked = (targets != NOT_SPOKEN).sum().clamp(min=1).item()
        learned = dict(self.prefix.named_parameters())
        loss = self.nats(learned, rows[:, :-1], targets) / n_asked
        values = {"loss": loss.item(), "rows": cfg.rows}
        if self.captions and self.step % cfg.captions.every == 0:
            changed = change(self.llm, self.rng.sample(self.captions, cfg.captions.together))
            return loss + cfg.captions.weight * changed, values | {"changed": changed.item()}
        return loss, values

    def train_step(self) -> dict[str, float]:
        self.seed()
        row = super().train_step()
        is_due = self.step % self.cfg.dev_every == 0 or self.step == self.n_steps
        if is_due and self.place.index == 0:
            row |= {f"perplexity_{name}": self.perplexity(said) for name, said in self.dev.items()}
        return row

    @torch.no_grad()
    def perplexity(self, sentences: Sequence[str]) -> float:
        """Of the averaged weights, a word: exp(nats of all tokens / words)."""
        with lent(self.adapters, self.average):
            total = self._total(sentences)
        a_word = total / sum(len(sentence.split()) for sentence in sentences)
        return math.exp(min(a_word, 100.0))  # a float holds no more than exp(709)

    def _total(self, sentences: Sequence[str]) -> float:
        """Nats of all tokens, with the averaged prefix."""
        prefix, bos, total = part(self.average, "text"), self.tokenizer.bos_id, 0.0
        rows = sorted((torch.tensor(encode(self.tokenizer, s)) for s in sentences), key=len)
        for i in range(0, len(rows), DEV_ROWS):
            some = rows[i : i + DEV_ROWS]
            ids = pad_sequence([row[:-1] for row in some], True, bos)
            targets = pad_sequence([self.number[row[1:]] for row in some], True, NOT_SPOKEN)
            total += self.nats(prefix, ids, targets).item()
        return total


def load_config(path: Path) -> PrefixConfig:
    return read_config(PrefixConfig, path)


def start(cfg: PrefixConfig, device: str = "cpu") -> Trainer:
    return Trainer(cfg, find_place(device, cfg.bf16))


if __name__ == "__main__":
    main("prefix", __doc__, lambda path, device: start(load_config(path), device))
