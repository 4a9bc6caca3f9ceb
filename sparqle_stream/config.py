"""All configuration: frozen dataclasses, validated when they are made, nested by stage.

Time inside the engine is counted in samples at 16 kHz. One encoder frame is 20 ms (320 samples),
one CTC frame 40 ms, one query 80 ms. A chunk is a whole number of queries.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from sparqle_stream.errors import ConfigError

SAMPLE_RATE_HZ = 16_000
FRAME_SAMPLES = 320  # one encoder frame, 20 ms
FRAMES_PER_QUERY = 4  # one query, 80 ms
FRAMES_PER_CTC = 2  # one CTC frame, 40 ms
QUERY_MS = 80
CHUNK_MS_RANGE = (80, 1280)
DELAY_MS_RANGE = (0, 960)
# Encoder frame p is heard once 320 * (p + 1) samples are in; its centre lies this much earlier
# (20 ms through the causal mel window, 20 ms through the convolution stem).
FRAME_LAG_SAMPLES = 640
LOOK_BACK_SAMPLES = 360  # before a mel frame's own hop
FLOOR_DB8 = 8.0  # Whisper clamps its log-mel at maximum - 8, in log10 units
FIRST_PEAK = 0.0  # log10 level that the gain assumes where nothing was heard beforehand
MEL_TAIL = 3  # mel frames that the encoder's stem looks back
SILENT_MEL = (1.5 - FLOOR_DB8 + 4.0) / 4.0  # features of digital silence


@dataclass(frozen=True, slots=True)
class FeatureConfig:
    """Streaming log-mel in Whisper's scale."""

    n_fft: int = 400
    hop_samples: int = 160
    n_mels: int = 80
    max_log10: float = 1.5  # stands in for Whisper's maximum over the utterance
    gain_target: float = 1.0  # log10 level that the automatic gain aims the peaks at
    gain_max: float = 3.5  # log10 units: 35 dB; more would lift digital silence over the floor
    gain_decay_per_s: float = 0.2  # log10 units a second: 2 dB/s
    lead_rise: float = 0.5  # log10 units that a voice becomes louder than its first phones

    def first_peak(self, loudest: float) -> float:
        """What the gain of a segment begins at; loudest: log-mel of its lead, without a gain."""
        return loudest * 4.0 - 4.0 + self.lead_rise


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Chunk-causal Whisper encoder. `left_frames` is the K/V ring of every layer.

    `max_ahead_frames`: as much of a stream's delay is spent on look-ahead (320 ms).
    """

    n_mels: int = 80
    width: int = 512
    n_heads: int = 8
    n_layers: int = 6
    n_positions: int = 1500
    left_frames: int = 256
    max_ahead_frames: int = 16

    @property
    def head_width(self) -> int:
        return self.width // self.n_heads

    @property
    def mel_tail(self) -> int:
        """Mel frames of the past that a step may need."""
        return MEL_TAIL + 2 * self.max_ahead_frames

    def ahead_frames(self, delay_ms: int) -> int:
        """The look-ahead of a stream that may be as late as `delay_ms`: whole frames of CTC."""
        ctc_samples = FRAMES_PER_CTC * FRAME_SAMPLES
        n_ctc = delay_ms * SAMPLE_RATE_HZ // (1000 * ctc_samples)
        return min(n_ctc * FRAMES_PER_CTC, self.max_ahead_frames)


@dataclass(frozen=True, slots=True)
class CtcConfig:
    """CTC head over pairs of encoder frames. Piece 0 is blank."""

    width: int = 512
    hidden: int = 512
    n_pieces: int = 256
    n_blocks: int = 0  # between the hidden layer and the pieces: they look back
    kernel: int = 11  # CTC frames that a block looks at, the newest included


@dataclass(frozen=True, slots=True)
class QFormerConfig:
    """Queries: one per 80 ms. `kind` is 'window' (streaming), 'stack' (baseline) or 'utterance'.

    'utterance' asks `n_queries` questions of the whole audio at once: offline only.
    """

    kind: str = "window"
    width: int = 512
    n_heads: int = 8
    n_layers: int = 2
    ffn: int = 2048
    encoder_width: int = 512
    llm_width: int = 576
    n_pieces: int = 256
    n_phases: int = 16  # queries are told how many more queries follow in their chunk
    frame_ring: int = 64  # encoder frames of the past that cross-attention sees (1.28 s)
    query_ring: int = 64  # past queries that self-attention sees (5.12 s)
    n_delays: int = 13  # 0, 80 .. 960 ms
    n_queries: int = 100  # of kind 'utterance': SparQLe's number, for audio of any length

    def __post_init__(self) -> None:
        if self.kind not in ("window", "stack", "utterance"):
            raise ConfigError(
                f"unknown qformer kind {self.kind!r}", hint="use window, stack or utterance"
            )


@dataclass(frozen=True, slots=True)
class LlmConfig:
    """Shape of a Llama-family decoder. `n_slot` is the K/V length of one stream's slot."""

    width: int = 576
    n_layers: int = 30
    n_heads: int = 9
    n_kv_heads: int = 3
    head_width: int = 64
    ffn: int = 1536
    vocab: int = 49_152
    rope_theta: float = 100_000.0
    rms_eps: float = 1e-5
    n_slot: int = 640


@dataclass(frozen=True, slots=True)
class VadConfig:
    """Speech detector and segmenter."""

    kind: str = "silero"  # silero | webrtc | off
    stop_ms: int = 800  # silence after which a segment ends
    pause_ms: int = 200  # silence after which words that were heard wait for nothing more
    preroll_ms: int = 960  # audio kept from before the detected start
    min_speech_ms: int = 96
    threshold: float = 0.3  # probability that makes a frame voiced: noise is the CTC's business
    threshold_off: float = 0.15  # and below which it is so no longer
    webrtc_mode: int = 2

    def __post_init__(self) -> None:
        if self.kind not in ("silero", "webrtc", "off"):
            raise ConfigError(f"unknown VAD {self.kind!r}", hint="use --vad silero, webrtc or off")
        if not 32 <= self.stop_ms <= 5000:
            raise ConfigError(
                f"--vad-stop {self.stop_ms} ms is out of range", hint="use 32 to 5000 ms"
            )


@dataclass(frozen=True, slots=True)
class CaptionConfig:
    """Text rules: caps against loops and invention (DESIGN rule 9)."""

    max_tokens_per_s: float = 12.0
    repeat_ngram: int = 6  # this many tokens, repeated `repeat_times` in a row, stop the segment
    repeat_times: int = 3
    no_text_warning_s: float = 3.0
    token_burst_s: float = 1.0  # seconds' worth of tokens that may be saved up
    # Letters that CTC hears pay for letters that the LLM writes: no text out of nothing.
    letters_per_heard: float = 1.6
    letter_slack: float = 6.0  # paid in advance with a segment's first piece
    max_letter_credit: float = 80.0
    tail_s: float = 5.0  # how far back the grey tail reaches
    lead_ms: int = 40  # a word begins this much before its first CTC piece
    hold_ms: int = 40  # and ends this much after its last
    # A segment that is cut without a pause hears the time of the delay again, whose words are still
    # to come, and this many chunks. More than 0 repeats what the context says, unlike in training.
    seam_chunks_again: int = 0
    seam_search_s: float = 4.0  # this long before the limit a cut where CTC is blank is looked for
    doubled_share: float = 0.7  # of a word's letters heard (again): it was said twice


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """What one stream may choose at run time."""

    chunk_ms: int = 320
    delay_ms: int = 240
    prompt: str = ""
    instruction: str = ""  # of the server's task: stands after any prompt, whoever gives it
    vad: VadConfig = field(default_factory=VadConfig)
    max_segment_s: float = 24.0

    def __post_init__(self) -> None:
        low, high = CHUNK_MS_RANGE
        if not low <= self.chunk_ms <= high or self.chunk_ms % QUERY_MS:
            raise ConfigError(
                f"--chunk-ms {self.chunk_ms} cannot be used",
                hint=f"use a multiple of {QUERY_MS} from {low} to {high}",
            )
        try:
            (self.prompt + self.instruction).encode()
        except UnicodeEncodeError as err:
            raise ConfigError("the prompt is no valid Unicode", hint="send it as UTF-8") from err
        low, high = DELAY_MS_RANGE
        if not low <= self.delay_ms <= high:
            raise ConfigError(f"--delay-ms {self.delay_ms} is out of range", hint=f"{low}..{high}")

    @property
    def chunk_samples(self) -> int:
        return self.chunk_ms * SAMPLE_RATE_HZ // 1000

    @property
    def chunk_frames(self) -> int:
        return self.chunk_samples // FRAME_SAMPLES

    @property
    def chunk_queries(self) -> int:
        return self.chunk_ms // QUERY_MS


@dataclass(frozen=True, slots=True)
class BeamConfig:
    """The search for words in what CTC hears; scores are natural logarithms.

    Chosen on development sets for the weights that they are stored with.
    """

    lm_weight: float = 0.65  # of word n-grams
    word_bonus: float = 1.8  # for each word, against the n-grams' liking for few
    blank_cost: float = 0.6  # of a frame that says nothing: CTC is too fond of blanks
    spell_cost: float = 8.0  # of a word that is in no lexicon
    letter_cost: float = 0.8  # of each of its letters
    size: int = 64  # hypotheses
    width: float = 11.0  # worse ones than the best by more are dropped
    piece_floor: float = -8.0  # pieces below are not gone on with
    spell_floor: float = -2.5  # nor those below, in words of no lexicon
    n_spelled: int = 12  # hypotheses that may go on with such words

    def __post_init__(self) -> None:
        if self.size < 1 or self.n_spelled < 0 or not self.width > 0:
            raise ConfigError("a beam needs a size and a width above 0", hint="see BeamConfig")


@dataclass(frozen=True, slots=True)
class WriterConfig:
    """How words are chosen and a chunk's text ends: by the LLM, or by LLM and CTC together.

    With a lexicon in the model folder the word beam says which words are due, and the stop head may
    only ask for punctuation. Chosen on development sets for the weights that they are stored with.
    """

    llm_weight: float = 0.3  # of the LLM's log-probability beside what was heard
    stop_threshold: float = 0.5  # without a lexicon: probability above which a chunk's text ends
    mark_odds: float = -0.5  # log-odds against stopping that punctuation takes where no word is due
    mark_margin: float = 3.0  # by which its logit must beat that of a word that is due
    case_margin: float = 0.5  # likewise capitals within a sentence, small letters at its beginning
    quiet_frames: int = 6  # of CTC (40 ms) without a piece, after which a word is over
    pause_frames: int = 3  # likewise while the detector hears no voice; it is then sure, too
    sure: float = 0.9  # share of the readings' probability that a word needs ...
    patience_frames: int = 22  # ... unless it is as old as this, in frames of CTC
    # Rival readings are judged as plain text where the model has a prefix for it (judge.py):
    text_weight: float = 0.6  # of their log-probability; 0: nobody judges
    text_share: float = 0.2  # of what the n-grams say of them that this takes the place of
    text_bonus: float = 1.0  # for each of their words
    n_rivals: int = 8  # readings at most
    rival_gap: float = 4.5  # nats that they may be behind the best

    def __post_init__(self) -> None:
        weights = self.llm_weight, self.text_weight
        if not (all(w >= 0 for w in weights) and 0 < self.stop_threshold < 1):
            raise ConfigError(
                "llm_weight and text_weight must be 0 or more, stop_threshold between 0 and 1",
                hint="see WriterConfig",
            )
        if not 0 <= self.sure <= 1:
            raise ConfigError(f"sure is a share from 0 to 1, not {self.sure}", hint="0.9 is usual")
        if not 2 <= self.n_rivals <= 8:
            raise ConfigError(f"{self.n_rivals} rivals cannot be judged", hint="2 to 8 can")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes of one whole model; stored as JSON beside its weights."""

    name: str = "sparqle-base-en"
    tasks: tuple[str, ...] = ("transcribe",)  # what it was trained for, by sparqle_stream.tasks
    features: FeatureConfig = field(default_factory=FeatureConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    ctc: CtcConfig = field(default_factory=CtcConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    beam: BeamConfig = field(default_factory=BeamConfig)
    writer: WriterConfig = field(default_factory=WriterConfig)


def n_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


BACKENDS = ("auto", "onnx", "torch")
DTYPES = ("auto", "int8", "float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: one device, `n_slots` streams, one chunk size for all of them."""

    n_slots: int = 16
    chunk_ms: int = 320
    threads: int = 0  # 0: as many as there are cores
    dtype: str = "auto"  # one of DTYPES; the engine takes the model as it was loaded
    compute: str = "cpu"  # cpu | cuda
    backend: str = "auto"  # one of BACKENDS, likewise
    cuda_graphs: bool = True  # likewise
    backlog_s: float = 30.0  # audio a stream may have waiting
    context_words: int = 8  # words carried into the next segment as text
