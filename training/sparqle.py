"""SparQLe as it was published, offline: checkpoint, speech encoder and LLM -> text of a recording.

`python -m training.sparqle SparQLe_best.pt --encoder FOLDER --llm FOLDER AUDIO... [--to de]`

Encoder (HuBERT or Whisper) and LLM (any causal one) are folders or names that transformers can
load; both must be those that the checkpoint was trained with. `--keys` lists what became of every
name in the checkpoint and does nothing else. Nothing of this streams; it is a reference.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparqle_stream import audio, sparqle
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ModelError
from sparqle_stream.tasks import LANGUAGES
from training.errors import reported

if TYPE_CHECKING:
    from torch import Tensor

    from sparqle_stream.sparqle import SparqleBridge
    from training.data import Floats

SPEECH = "<Speech>", "</Speech>"  # what SparQLe puts around the answers
TRANSCRIBE = "Transcribe the speech."
ENCODERS = ("hubert", "whisper")


@dataclass(slots=True)
class Offline:
    """A speech encoder, the bridge of a checkpoint and an LLM, with what they read and write."""

    kind: str  # of the encoder
    encoder: Any
    extract: Any
    bridge: SparqleBridge
    llm: Any
    tokenizer: Any

    @torch.inference_mode()
    def listen(self, pcm: Floats) -> Tensor:
        """PCM (S,) at 16 kHz -> frames (1, T, E); of Whisper only those of the recording."""
        given = self.extract(pcm, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")
        if self.kind == "hubert":
            frames: Tensor = self.encoder(given["input_values"]).last_hidden_state
            return frames
        frames = self.encoder(given["input_features"]).last_hidden_state
        return frames[:, : max(1, -(-len(pcm) // 320))]

    @torch.inference_mode()
    def write(self, pcm: Floats, request: str, n_most: int = 128) -> str:
        """Greedy text for PCM (S,). No n-gram is forbidden: people do say things twice."""
        asked = self.bridge(self.listen(pcm))
        before, after = (self._embed(text) for text in self.prompt(request))
        embeds = torch.cat([before, asked.to(before.dtype), after], dim=1)
        seen = torch.ones(embeds.shape[:2], dtype=torch.long)
        ids = self.llm.generate(
            inputs_embeds=embeds,
            attention_mask=seen,
            max_new_tokens=n_most,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
        )
        return str(self.tokenizer.decode(ids[0], skip_special_tokens=True)).strip()

    def prompt(self, request: str) -> tuple[str, str]:
        """What stands before the answers and after them, by the LLM's own chat template."""
        marker = "\u241e"
        content = f"{SPEECH[0]}{marker}{SPEECH[1]} {request}"
        if self.tokenizer.chat_template:
            talk = [{"role": "user", "content": content}]
            whole = self.tokenizer.apply_chat_template(
                talk, tokenize=False, add_generation_prompt=True
            )
        else:
            whole = f"{self.tokenizer.bos_token or ''}{content}\n"
        before, _, after = str(whole).partition(marker)
        return before, after

    def _embed(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        embedded: Tensor = self.llm.get_input_embeddings()(ids)
        return embedded


def load(checkpoint: Path, encoder: str, llm: str) -> Offline:
    """The preset. Raises ModelError for parts that do not fit one another."""
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForCausalLM,
        AutoTokenizer,
    )

    bridge, _ = sparqle.load(checkpoint)
    try:
        kind = AutoConfig.from_pretrained(encoder).model_type
        if kind not in ENCODERS:
            raise ModelError(f"{encoder} is a {kind} model", hint=f"use {' or '.join(ENCODERS)}")
        ears: Any = AutoModel.from_pretrained(encoder)
        ears = ears.encoder if kind == "whisper" else ears
        extract = AutoFeatureExtractor.from_pretrained(encoder)  # type: ignore[no-untyped-call]
        talker: Any
        talker, tokenizer = (
            each.from_pretrained(llm) for each in (AutoModelForCausalLM, AutoTokenizer)
        )
    except (OSError, ValueError) as err:
        first_line = str(err).strip().partition("\n")[0]
        raise ModelError(f"cannot load encoder or LLM: {first_line}", hint="give folders") from err
    width = ears.config.d_model if kind == "whisper" else ears.config.hidden_size
    shape, llm_width = bridge.shape, talker.get_input_embeddings().weight.shape[1]
    for name, ours, theirs in (
        ("encoder", shape.encoder_width, width),
        ("llm", shape.llm_width, llm_width),
    ):
        if ours != theirs:
            raise ModelError(
                f"the checkpoint was trained with an {name} of width {ours}, this has {theirs}",
                hint=f"give --{name} the one that it was trained with",
            )
    return Offline(kind, ears.eval(), extract, bridge, talker.eval(), tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.sparqle", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("audio", nargs="*")
    parser.add_argument("--encoder", default="facebook/hubert-large-ll60k")
    parser.add_argument("--llm", help="folder or name of the LLM it was trained with")
    parser.add_argument("--to", choices=sorted(LANGUAGES), help="translate instead of transcribe")
    parser.add_argument("--keys", action="store_true", help="list the names in the checkpoint")
    args = parser.parse_args()
    with reported():
        if args.keys:
            state = sparqle.read(args.checkpoint)
            bridge = sparqle.SparqleBridge(sparqle.shape_of(state, args.checkpoint))
            print("\n".join(sparqle.compare(bridge, state).lines()))
            return
        if not args.llm:
            raise ModelError("the LLM is not in the checkpoint", hint="name it: --llm FOLDER")
        offline = load(args.checkpoint, args.encoder, args.llm)
        wish = f"Translate the speech into {LANGUAGES[args.to]}." if args.to else TRANSCRIBE
        for name in args.audio:
            pcm = audio.read_file(Path(name))
            print(offline.write(pcm, wish))


if __name__ == "__main__":
    main()
