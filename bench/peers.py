"""Peers: other recognisers, each behind one function: PCM (S,) and a number of tokens -> text.

Contract: a peer is used as it comes, with the threads it is given, and only if its package is
installed; nothing is fetched. Whisper has random weights of the same shape here, so that nobody
needs its files: it writes exactly as many tokens as it is told, and its speed and memory are those
of real weights, but for the early end and the repeats that real ones are prone to. What it loads is
written beforehand, by another process: making it takes more memory than running it.
Whoever has real weights of others gives them by name (`real_peers`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import real_peers
from bench.socket_target import s16
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy.typing as npt

    from bench.settings import Settings

    Pcm = npt.NDArray[np.float32]
    Hear = Callable[[Pcm, int], str]

WINDOW_S = 30  # of Whisper
TOKENS_PER_WORD = 1.3  # of English in Whisper's vocabulary
TOKENS_PER_S = 3.5  # where nobody knows what is said
SHAPES = {"tiny": (384, 4, 6), "base": (512, 6, 8)}  # width, layers, heads
# Whisper's vocabulary is 51 865 ids; these are the ones that its runners look up.
VOCABULARY = 51_865
SPECIAL = {
    50_257: "<|endoftext|>",
    50_258: "<|startoftranscript|>",
    50_259: "<|en|>",
    50_359: "<|transcribe|>",
    50_362: "<|nospeech|>",
    50_363: "<|notimestamps|>",
}
SEED = 0  # of random weights
PROMPT = [50_258, 50_259, 50_359, 50_363]


@dataclass(frozen=True, slots=True)
class Peer:
    """One recogniser in one way of use. `packages`: what must be installed, the version's first.

    make: settings, and the folder that `write` wrote or the user gave -> what hears. write: makes
    what is loaded. wants_weights: a folder of the user's is needed.
    """

    what: str
    packages: tuple[str, ...]
    make: Callable[..., Hear]
    has_real_weights: bool = False
    write: Callable[[Path], None] | None = None
    wants_weights: bool = False

    def missing(self) -> str:
        """What is not installed, '' if it can run."""
        names = [p for p in self.packages if importlib.util.find_spec(p.replace("-", "_")) is None]
        return ", ".join(names)

    def version(self) -> str:
        """Name and version; the name alone where it was not installed as a package."""
        name = self.packages[0]
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return name


def require(name: str, weights: Mapping[str, Path] | None = None) -> None:
    """Raises ConfigError for a peer whose packages are not installed or whose weights are not
    given."""
    if what := PEERS[name].missing():
        raise ConfigError(f"{name} needs {what}", hint="pip install -e .[peers]")
    if PEERS[name].wants_weights and name not in (weights or {}):
        raise ConfigError(f"{name} needs its weights", hint=f"--weights {name}=FOLDER")


def tokens_for(text: str, n_samples: int) -> int:
    """As many tokens as a text has, or as speech of that length usually has; one at least."""
    words = len(text.split())
    n = TOKENS_PER_WORD * words if words else TOKENS_PER_S * n_samples / SAMPLE_RATE_HZ
    return max(1, round(n))


# --- ours and pocketsphinx ---------------------------------------------------------------------


def _sparqle(wanted: Settings) -> Hear:
    from bench.scoring import text_of
    from sparqle_stream.engine import Engine

    engine = Engine(wanted.load_model(), wanted.engine_config())
    options = wanted.stream_options()

    def hear(pcm: Pcm, n_tokens: int) -> str:
        del n_tokens  # it writes what it hears
        return text_of(engine.transcribe(pcm, options))

    return hear


def _pocketsphinx(wanted: Settings) -> Hear:
    import pocketsphinx

    del wanted  # one thread, always
    decoder = pocketsphinx.Decoder(samprate=SAMPLE_RATE_HZ, loglevel="FATAL")

    def hear(pcm: Pcm, n_tokens: int) -> str:
        del n_tokens
        decoder.start_utt()
        decoder.process_raw(s16(pcm), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return str(found.hypstr) if found else ""

    return hear


# --- Whisper's shape ---------------------------------------------------------------------------


def _random_whisper(shape: str) -> Any:  # noqa: ANN401 - transformers has no types of its own
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    width, layers, heads = SHAPES[shape]
    cfg = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
    )
    torch.manual_seed(SEED)
    model: Any = WhisperForConditionalGeneration(cfg)
    return model.eval()


def _transformers(shape: str, wanted: Settings) -> Hear:
    """Float32 and greedy, as its examples have it."""
    import torch
    import transformers

    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    whisper: Any = transformers
    model, extract = _random_whisper(shape), whisper.WhisperFeatureExtractor()
    prompt = torch.tensor([PROMPT])

    @torch.inference_mode()
    def hear(pcm: Pcm, n_tokens: int) -> str:
        features = extract(pcm, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features
        heard = model.model.encoder(features)
        state = model(decoder_input_ids=prompt, encoder_outputs=heard, use_cache=True)
        for _ in range(n_tokens - 1):
            token = state.logits[:, -1:].argmax(dim=-1)
            state = model(
                decoder_input_ids=token,
                encoder_outputs=heard,
                past_key_values=state.past_key_values,
                use_cache=True,
            )
        return ""

    return hear


def _write_ctranslate2(shape: str, folder: Path) -> None:
    """Random weights in int8 as CTranslate2 loads them."""
    from ctranslate2.converters import transformers as conversion

    loader = conversion._MODEL_LOADERS["WhisperConfig"]
    spec = loader.get_model_spec(_random_whisper(shape))
    spec.register_vocabulary([SPECIAL.get(i, f"t{i}") for i in range(VOCABULARY)])
    spec.validate()
    spec.optimize(quantization="int8")
    spec.save(str(folder))


def _ctranslate2(wanted: Settings, folder: Path) -> Hear:
    """int8 and greedy, with the features of faster-whisper, which runs on it."""
    import ctranslate2
    from faster_whisper.feature_extractor import FeatureExtractor

    model = ctranslate2.models.Whisper(
        str(folder), device="cpu", compute_type="int8", intra_threads=wanted.threads
    )
    extract = FeatureExtractor()

    def hear(pcm: Pcm, n_tokens: int) -> str:
        mel = extract(pcm)[:, : 100 * WINDOW_S]
        window = np.zeros((1, mel.shape[0], 100 * WINDOW_S), np.float32)
        window[0, :, : mel.shape[1]] = mel
        model.generate(
            model.encode(ctranslate2.StorageView.from_array(window)),
            [PROMPT],
            beam_size=1,
            max_length=2 * n_tokens,  # half of it is for the prompt
            suppress_blank=False,
            suppress_tokens=[50_257],  # no early end
        )
        return ""

    return hear


def whole(hear: Hear) -> Hear:
    """Once over a recording, in windows of 30 s."""

    def hear_whole(pcm: Pcm, n_tokens: int) -> str:
        step = WINDOW_S * SAMPLE_RATE_HZ
        for start in range(0, len(pcm), step):
            window = pcm[start : start + step]
            hear(window, share(n_tokens, len(window), len(pcm)))
        return ""

    return hear_whole


def growing(hear: Hear) -> Hear:
    """The last 30 s of what was said so far, once more each second: live captions of Whisper."""

    def hear_growing(pcm: Pcm, n_tokens: int) -> str:
        for end in range(SAMPLE_RATE_HZ, len(pcm) + SAMPLE_RATE_HZ, SAMPLE_RATE_HZ):
            window = pcm[max(0, end - WINDOW_S * SAMPLE_RATE_HZ) : end]
            hear(window, share(n_tokens, len(window), len(pcm)))
        return ""

    return hear_growing


def share(n_tokens: int, n_samples: int, n_all: int) -> int:
    """Tokens of a part of a recording, one at least."""
    return max(1, round(n_tokens * n_samples / n_all))


def _whisper(runner: str, shape: str, use: str) -> Peer:
    wrap, when = {
        "offline": (whole, "once over each recording"),
        "growing": (growing, "the audio so far again each second"),
    }[use]
    packages = {
        "transformers": ("transformers",),
        "faster-whisper": ("ctranslate2", "faster-whisper", "transformers"),
    }[runner]
    precision = {"transformers": "float32", "faster-whisper": "int8"}[runner]
    what = f"Whisper {shape}, random weights, {precision}, {when}"
    if runner == "transformers":
        return Peer(what, packages, lambda wanted: wrap(_transformers(shape, wanted)))
    return Peer(
        what,
        packages,
        lambda wanted, folder: wrap(_ctranslate2(wanted, folder)),
        write=lambda folder: _write_ctranslate2(shape, folder),
    )


def _real(what: str, packages: tuple[str, ...], make: Callable[..., Hear]) -> Peer:
    return Peer(what, packages, make, has_real_weights=True, wants_weights=True)


OURS = "sparqle"
PEERS: dict[str, Peer] = {
    OURS: Peer("streaming", ("sparqle-stream",), _sparqle, has_real_weights=True),
    "pocketsphinx": Peer(
        "as shipped, each recording at once",
        ("pocketsphinx",),
        _pocketsphinx,
        has_real_weights=True,
    ),
} | {
    f"{runner}-{shape}-{use}": _whisper(runner, shape, use)
    for runner in ("faster-whisper", "transformers")
    for shape in SHAPES
    for use in ("offline", "growing")
}
PEERS |= {
    "faster-whisper": _real(
        "real weights, int8, as its defaults have it, each recording at once",
        ("faster-whisper",),
        real_peers.faster_whisper,
    ),
    "vosk": _real("real weights, streaming, 0.2 s at a time", ("vosk",), real_peers.vosk),
    "moonshine": _real(
        "real weights, each recording at once", ("moonshine-voice",), real_peers.moonshine
    ),
}
