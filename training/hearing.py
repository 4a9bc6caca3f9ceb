"""What an ear hears: streams -> log-mel, recordings -> posteriors; its distance to a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sparqle_stream import features
from sparqle_stream.config import (
    FRAMES_PER_CTC,
    SILENT_MEL,
    CtcConfig,
    EncoderConfig,
    FeatureConfig,
)
from sparqle_stream.ctc import CtcHead
from sparqle_stream.encoder import Encoder
from sparqle_stream.errors import ModelError
from sparqle_stream.weights import expanded, load_into, part, read_safetensors, whisper_config
from training.data import spec_augment, stack

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from training.data import AugmentConfig, Floats

LEFT_FRAMES = 256
N_POSITIONS = EncoderConfig().n_positions
BATCH = 12  # recordings of like length that are heard together
CTC_SAMPLES = 640  # one CTC frame, 40 ms
PAD_FRAMES = 16  # four queries


@torch.no_grad()
def mel_of(pcm: Tensor, device: torch.device) -> Tensor:
    """PCM (B, S) of whole chunks, int16 or -1..1 -> log-mel (B, 2 T, 80) as the engine's."""
    everyone = torch.ones(len(pcm), dtype=torch.bool, device=device)
    state = features.init_state(FeatureConfig(), len(pcm), device=device)
    pcm = pcm.to(device, non_blocking=True)
    if pcm.dtype == torch.int16:
        pcm = pcm.float() / 32768
    return features.step(FeatureConfig(), state, pcm, everyone)[1]


def hear(
    pcm: Tensor,
    rng: random.Random,
    augment: AugmentConfig,
    device: torch.device,
    n_views: int = 1,
) -> tuple[Tensor, Tensor]:
    """What a student gets of PCM (B, S): log-mel (B, 2 T, 80), in a share of the batches with
    SpecAugment, and the position (B,) at which each row begins; of `n_views`, one after the other,
    each has masks and positions of its own."""
    mel = mel_of(pcm, device).repeat(n_views, 1, 1)
    if rng.random() < augment.spec:
        mel = spec_augment(mel, rng, SILENT_MEL, augment)
    offset = [rng.randrange(N_POSITIONS) if rng.random() < augment.offset else 0 for _ in mel]
    return mel, torch.tensor(offset, device=device)


def whole(teacher: Encoder, mel: Tensor, ahead: int) -> Tensor:
    """mel (B, 2 T, 80) -> frames (B, T, D) that a teacher has for it with full context.

    Before it lie `ahead` frames of silence, as they do for a student who looks ahead: Whisper's
    frames of the same speech are others behind silence, and at other positions.
    """
    mel = F.pad(mel, (0, 0, 2 * ahead, 0), value=SILENT_MEL)
    first = torch.zeros(len(mel), dtype=torch.long, device=mel.device)
    return teacher.forward_train(mel, 0, 0, first)[:, ahead:]


def padded(mel: Tensor, ahead: int) -> Tensor:
    """mel (B, 2 T, M) with silence after it: frames that come `ahead` late come to the last one.

    The silence is a whole number of groups of queries, however they are merged.
    """
    n_frames = -(-ahead // PAD_FRAMES) * PAD_FRAMES
    return F.pad(mel, (0, 0, 0, 2 * n_frames), value=SILENT_MEL)


def distil_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Frame MSE (relative to the teacher's variance) + 0.5 cosine distance."""
    mse = (student - teacher).square().mean() / teacher.var().clamp(min=1e-3)
    return mse + 0.5 * (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def load_encoder(path: Path) -> Encoder:
    """An encoder alone, as `prepare whisper` and training.distill write it. Raises ModelError."""
    state = read_safetensors(path)
    encoder = Encoder(encoder_config(state, path))
    load_into(encoder, state)
    return encoder


def load_ear(path: Path, n_pieces: int, device: str = "cpu") -> tuple[Encoder, CtcHead]:
    """Encoder and CTC head of training.adapt or of a model folder; in float32 whatever is stored.

    Raises ModelError for weights that do not fit.
    """
    ear = expanded(read_safetensors(path))
    state, ctc = part(ear, "encoder"), part(ear, "ctc")
    cfg = encoder_config(state, path)
    encoder, head = Encoder(cfg), CtcHead(head_config(ctc, cfg.width, n_pieces))
    load_into(encoder, state)
    load_into(head, ctc)
    for module in (encoder, head):
        module.eval().requires_grad_(False).to(device)
    return encoder, head


def head_config(ctc: dict[str, Tensor], width: int, n_pieces: int) -> CtcConfig:
    """The shape of a CTC head by its weights."""
    hidden = len(ctc["hidden.bias"]) if "hidden.bias" in ctc else CtcConfig().hidden
    n_blocks = sum(name.endswith(".conv.bias") for name in ctc)
    kernel = ctc["blocks.0.conv.weight"].shape[2] if n_blocks else CtcConfig().kernel
    return CtcConfig(width, hidden, n_pieces, n_blocks, kernel)


def encoder_config(state: dict[str, Tensor], where: Path) -> EncoderConfig:
    """The shape of an encoder by its weights. Raises ModelError for a file without one."""
    if "conv1.weight" not in state:
        raise ModelError(f"{where} holds no encoder", hint="give weights of training.adapt")
    return whisper_config(state)


@torch.no_grad()
def posteriors(
    encoder: Encoder,
    head: CtcHead,
    recordings: Sequence[Floats],
    chunk_frames: int,
    ahead: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """PCM (S,) each -> (index, log-probabilities (T, V) at 25 Hz), like lengths together.

    Only frames of the recording itself come out; chunk_frames 0 is full context, `ahead` frames are
    looked at after each chunk.
    """
    order = sorted(range(len(recordings)), key=lambda i: len(recordings[i]))
    device = next(encoder.parameters()).device
    for at in range(0, len(order), BATCH):
        batch = order[at : at + BATCH]
        mel = padded(mel_of(stack([recordings[i] for i in batch]), device), ahead)
        offset = torch.zeros(len(batch), dtype=torch.long, device=device)
        frames = encoder.forward_train(mel, chunk_frames, LEFT_FRAMES, offset, ahead)
        for i, row in zip(batch, head(frames).cpu()[:, ahead // FRAMES_PER_CTC :], strict=True):
            yield i, row[: -(-len(recordings[i]) // CTC_SAMPLES)]
