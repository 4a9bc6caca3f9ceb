"""Graphs: what `features`, `encoder` with `ctc`, `qformer` and `llm` compute in a step, as ONNX.

In: configs and weights under the names of the torch modules, as numpy arrays. Out: a `Graph` each.
History goes in as rings and slots and what is new comes out: the caller writes it into its rings
(position modulo length); the LLM's slots alone are written in place. With matrices in int8 rows of
input are rounded too, each by itself, rings are float16 and slots int8. All in float32 the graphs
equal the torch stages to 1e-3 over a stream; tests/onnx_cpu says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream.config import (
    FLOOR_DB8,
    FRAMES_PER_QUERY,
    LOOK_BACK_SAMPLES,
    QUERY_MS,
    SAMPLE_RATE_HZ,
)
from sparqle_stream.onnx_cpu.graph import FLOAT, INT8, INT32, INT64, Floats, Graph
from sparqle_stream.onnx_cpu.settings import UNSEEN, places

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sparqle_stream.config import (
        CtcConfig,
        EncoderConfig,
        FeatureConfig,
        LlmConfig,
        QFormerConfig,
    )

    Weights = Mapping[str, Floats]
    Shape = list[int | str]

EPS = 1e-5  # of LayerNorm


# --- features -------------------------------------------------------------------------------------


def features(cfg: FeatureConfig, mel_filters: Floats) -> Graph:
    """wave (B, 360 + S), peak (B) -> mel (B, F, M), new_peak (B); mel_filters (n_fft / 2 + 1, M).

    The spectrum is a product with the cosines and sines of a windowed Fourier transform.
    """
    g = Graph("features")
    wave = g.input("wave", FLOAT, ["B", "W"])
    peak = g.input("peak", FLOAT, ["B"])
    n_samples = g.add("Sub", g.size(wave, 1), g.const([LOOK_BACK_SAMPLES]))
    frame = g.count(g.add("Div", n_samples, g.const([cfg.hop_samples])))
    start = g.unsqueeze(g.add("Mul", frame, g.const(cfg.hop_samples)), 1)
    index = g.add("Add", start, g.const(np.arange(cfg.n_fft)))
    spectrum = g.linear(g.add("Gather", wave, index, axis=1), _fourier(cfg.n_fft))
    half = cfg.n_fft // 2 + 1
    squares = g.add("Mul", spectrum, spectrum)
    power = g.add("Add", *g.add("Split", squares, g.const([half, half]), axis=-1, outputs=2))
    energy = g.add("Max", g.add("MatMul", power, g.const(mel_filters)), g.const(1e-10))
    log = g.add("Mul", g.add("Log", energy), g.const(1.0 / np.log(10.0)))
    gain, new_peak = _slow_gain(g, cfg, g.add("ReduceMax", log, g.const([2]), keepdims=0), peak)
    loud = g.add("Add", log, g.unsqueeze(gain, 2))
    floored = g.add("Max", loud, g.const(cfg.max_log10 - FLOOR_DB8))
    mel = g.add("Mul", g.add("Add", floored, g.const(4.0)), g.const(0.25))
    g.output("mel", mel, ["B", "F", cfg.n_mels])
    g.output("new_peak", new_peak, ["B"])
    return g


def _fourier(n_fft: int) -> Floats:
    """(2 (n / 2 + 1), n): rows of cosines, then of sines, under a periodic Hann window."""
    n = np.arange(n_fft)
    angle = 2.0 * np.pi * np.outer(np.arange(n_fft // 2 + 1), n) / n_fft
    window = 0.5 - 0.5 * np.cos(2.0 * np.pi * n / n_fft)
    return (np.concatenate([np.cos(angle), np.sin(angle)]) * window).astype(np.float32)


def _slow_gain(g: Graph, cfg: FeatureConfig, loud: str, peak: str) -> tuple[str, str]:
    """loud (B, F), peak (B) -> gain (B, F), new peak (B); see sparqle_stream.features."""
    decay = cfg.gain_decay_per_s * cfg.hop_samples / SAMPLE_RATE_HZ
    frame = g.count(g.size(loud, 1))
    ramp = g.add("Mul", g.add("Cast", g.add("Add", frame, g.const(1)), to=FLOAT), g.const(decay))
    is_past = g.add("LessOrEqual", g.unsqueeze(frame, 0), g.unsqueeze(frame, 1))  # (F, F)
    risen = g.unsqueeze(g.add("Add", loud, ramp), 1)  # (B, 1, F)
    seen = g.add("Where", is_past, risen, g.const(UNSEEN))
    highest = g.add("ReduceMax", seen, g.const([2]), keepdims=0)
    slow = g.add("Sub", g.add("Max", highest, g.unsqueeze(peak, 1)), ramp)
    slow = g.add("Max", slow, g.const(cfg.gain_target - cfg.gain_max))
    gain = g.add("Max", g.add("Sub", g.const(cfg.gain_target), slow), g.const(0.0))
    return gain, g.add("Squeeze", g.slice(slow, -1, np.iinfo(np.int64).max, 1), g.const([1]))


# --- the ear: encoder and CTC ---------------------------------------------------------------------


def ear(
    cfg: EncoderConfig,
    encoder: Weights,
    head: CtcConfig,
    ctc: Weights,
    *,
    is_int8: bool = False,
) -> Graph:
    """mel (B, 3 + 2 T + 2 ahead, M) -> frames (B, T, D), log_probs, new K and V of a chunk.

    ahead (1): frames of look-ahead, which the chunk sees and which are forgotten; position (B):
    frames since the start; ring_position (B, L): -1 where nothing was written; k_i, v_i
    (B, H, L, d): each layer's ring. A head with blocks has ctc_past (B, N, K - 1, H) besides.
    """
    g = Graph("ear", is_int8=is_int8)
    mel = g.input("mel", FLOAT, ["B", "M", cfg.n_mels])
    position = g.input("position", INT64, ["B"])
    ring_position = g.input("ring_position", INT64, ["B", cfg.left_frames])
    x = _stem(g, cfg, encoder, mel, position)
    n_new = g.add("Sub", g.size(x, 1), g.input("ahead", INT64, [1]))
    unseen = g.unsqueeze(_mask(g, ring_position), 1, 2)  # (B, 1, 1, L)
    normed = _normed(g, encoder, "blocks.0.attn_ln", x)
    for i in range(cfg.n_layers):
        part = {k.removeprefix(f"blocks.{i}."): v for k, v in encoder.items()}
        after = "ln_post" if i + 1 == cfg.n_layers else f"blocks.{i + 1}.attn_ln"
        x, normed = _block(g, cfg, part, i, (x, normed), (unseen, n_new), _norm(g, encoder, after))
    g.output("frames", normed, ["B", "T", cfg.width])
    g.output("log_probs", _ctc(g, head, ctc, normed), ["B", "C", head.n_pieces])
    return g


def _stem(g: Graph, cfg: EncoderConfig, w: Weights, mel: str, position: str) -> str:
    """Convolutions as products of three frames side by side; that of the mel frames is small, and
    stays in float32."""
    first, second = (w[f"{name}.weight"].transpose(0, 2, 1) for name in ("conv1", "conv2"))
    x = g.add("MatMul", g.windows(mel, 3, 1), g.const(first.reshape(len(first), -1).T))
    x = g.add("BiasGelu", x, g.const(w["conv1.bias"]))
    x = g.linear(g.windows(x, 3, 2), second.reshape(len(second), -1))
    x = g.add("BiasGelu", x, g.const(w["conv2.bias"]))
    frame = g.add("Add", g.unsqueeze(position, 1), g.count(g.size(x, 1)))
    index = g.add("Mod", frame, g.const(cfg.n_positions))
    return str(g.add("Add", x, g.add("Gather", g.const(w["positions"]), index, axis=0)))


def _block(
    g: Graph,
    cfg: EncoderConfig,
    w: Weights,
    i: int,
    before: tuple[str, str],
    seen: tuple[str, str],
    after: tuple[str, str],
) -> tuple[str, str]:
    """One block: (x, normed x) -> x after it, normed with `after` for what follows.

    seen: what to add to the scores of the ring, and the length of the chunk.
    """
    (x, normed), (unseen, n_new) = before, seen
    ring: Shape = ["B", cfg.n_heads, cfg.left_frames, cfg.head_width]
    past_k, past_v = g.ring(f"k_{i}", ring), g.ring(f"v_{i}", ring)
    scale = cfg.head_width**-0.5
    qkv = np.concatenate([w["query.weight"] * scale, w["key.weight"], w["value.weight"]])
    no_bias = np.zeros(cfg.width, np.float32)
    bias = np.concatenate([w["query.bias"] * scale, no_bias, w["value.bias"]])
    parts = g.add("Split", g.linear(normed, qkv, bias), axis=-1, num_outputs=3, outputs=3)
    q, k, v = (g.heads(part, cfg.n_heads) for part in parts)
    new: Shape = ["B", cfg.n_heads, "T", cfg.head_width]
    g.output(f"new_k_{i}", g.first(k, n_new, 2), new)
    g.output(f"new_v_{i}", g.first(v, n_new, 2), new)
    if i + 1 == cfg.n_layers:  # nobody asks for what lies ahead any more
        x, q = g.first(x, n_new, 1), g.first(q, n_new, 2)
    # The ring is read where it lies: its scores are computed apart from those of the new frames.
    past = g.add("Add", g.scores(q, past_k), unseen)
    p = g.add("Softmax", g.concat(past, g.scores(q, k), axis=-1), axis=-1)
    sizes = g.concat(g.const([cfg.left_frames]), g.size(k, 2), axis=0)
    p_past, p_new = g.add("Split", p, sizes, axis=-1, outputs=2)
    mixed = g.add("Add", g.add("MatMul", p_past, past_v), g.add("MatMul", p_new, v))
    out = g.linear(g.merged(mixed), w["out.weight"])
    normed, x = _add_norm(g, out, x, _norm(g, w, "mlp_ln"), w["out.bias"])
    hidden = g.linear(normed, w["fc1.weight"])
    hidden = g.add("BiasGelu", hidden, g.const(w["fc1.bias"]))
    normed, x = _add_norm(g, g.linear(hidden, w["fc2.weight"]), x, after, w["fc2.bias"])
    return x, normed


def _ctc(g: Graph, cfg: CtcConfig, w: Weights, frames: str) -> str:
    """frames (B, T, D) -> log-probabilities (B, T / 2, V)."""
    pairs = g.reshape(frames, 0, -1, len(w["norm.weight"]))
    x = g.linear(_normed(g, w, "norm", pairs), w["hidden.weight"])
    x = g.add("BiasGelu", x, g.const(w["hidden.bias"]))
    if cfg.n_blocks:
        shape: Shape = ["B", cfg.n_blocks, cfg.kernel - 1, cfg.hidden]
        past, new = g.input("ctc_past", FLOAT, shape), []
        n_new = g.size(x, 1)
        window = g.add("Add", g.unsqueeze(g.count(n_new), 1), g.const(np.arange(cfg.kernel)))
        for i in range(cfg.n_blocks):
            part = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items()}
            before = g.add("Squeeze", g.slice(past, i, i + 1, 1), g.const([1]))
            x, seen = _ctc_block(g, part, x, before, window)
            end, axis = g.const([np.iinfo(np.int64).max]), g.const([1])
            new.append(g.unsqueeze(g.add("Slice", seen, n_new, end, axis), 1))
        g.output("new_ctc_past", g.concat(*new, axis=1), shape)
        x = _normed(g, w, "out_norm", x)
    return str(g.add("LogSoftmax", g.linear(x, w["out.weight"], w["out.bias"]), axis=-1))


def _ctc_block(g: Graph, w: Weights, x: str, before: str, window: str) -> tuple[str, str]:
    """x (B, C, H), before (B, K - 1, H) -> x after the block, and what its convolution saw.

    window (C, K): which of what it saw belong to each frame.
    """
    gated = g.linear(_normed(g, w, "gate_ln", x), w["gate.weight"], w["gate.bias"])
    value, gate = g.add("Split", gated, axis=-1, num_outputs=2, outputs=2)
    seen = g.concat(before, g.add("Mul", value, g.add("Sigmoid", gate)), axis=1)
    # Depthwise: the library's Conv would make a product of one column for every channel.
    side = g.add("Gather", seen, window, axis=1)  # (B, C, K, H)
    weighted = g.add("Mul", side, g.const(w["conv.weight"][:, 0].T))
    mixed = g.add("ReduceSum", weighted, g.const([2]), keepdims=0)
    mixed = g.add("Gelu", _normed(g, w, "conv_ln", g.add("Add", mixed, g.const(w["conv.bias"]))))
    x = g.add("Add", x, g.linear(mixed, w["merge.weight"], w["merge.bias"]))
    hidden = g.linear(_normed(g, w, "mlp_ln", x), w["fc1.weight"])
    hidden = g.add("BiasGelu", hidden, g.const(w["fc1.bias"]))
    return str(g.add("Add", x, g.linear(hidden, w["fc2.weight"], w["fc2.bias"]))), seen


def _normed(g: Graph, w: Weights, name: str, x: str) -> str:
    return str(g.add("LayerNormalization", x, *_norm(g, w, name), epsilon=EPS, axis=-1))


# --- the Q-Former ---------------------------------------------------------------------------------


def qformer(cfg: QFormerConfig, w: Weights, *, is_int8: bool = False) -> Graph:
    """frames (B, T, W), log_probs (B, T / 2, V) of a chunk -> queries (B, Q, E), new K and V.

    before (B, 1, V): CTC posteriors of the frame before the chunk; delay_ms (B); position (B):
    frames before the chunk; frame_position (B, Lf), query_position (B, Lq): -1 where nothing was
    written; self_k_i, self_v_i (B, H, Lq, d), cross_k_i, cross_v_i (B, H, Lf, d): each layer's
    rings, of past queries and of past frames.
    """
    g = Graph("qformer", is_int8=is_int8)
    frames = g.input("frames", FLOAT, ["B", "T", cfg.encoder_width])
    log_probs = g.input("log_probs", FLOAT, ["B", "C", cfg.n_pieces])
    before = g.input("before", FLOAT, ["B", 1, cfg.n_pieces])
    delay_ms = g.input("delay_ms", INT64, ["B"])
    x = _stacked(g, cfg, w, frames) if cfg.kind == "stack" else _asked(g, cfg, w, frames)
    normed = _normed(g, w, "out_norm", x)
    x = g.linear(normed, w["out.weight"], w["out.bias"])
    rounded = g.add("Add", delay_ms, g.const(QUERY_MS // 2))
    delay = g.add("Div", rounded, g.const(QUERY_MS))
    told = g.unsqueeze(g.add("Gather", g.const(w["delay.weight"]), delay, axis=0), 1)
    heard = _heard(g, w, log_probs, before)
    g.output("queries", g.add("Add", g.add("Add", x, heard), told), ["B", "Q", cfg.llm_width])
    return g


def _stacked(g: Graph, cfg: QFormerConfig, w: Weights, frames: str) -> str:
    rows = g.reshape(frames, 0, -1, FRAMES_PER_QUERY * cfg.encoder_width)
    return str(g.add("Gelu", g.linear(rows, w["stack.weight"], w["stack.bias"])))


def _asked(g: Graph, cfg: QFormerConfig, w: Weights, frames: str) -> str:
    """frames (B, T, W) -> (B, Q, D): the layers of kind 'window'."""
    position = g.unsqueeze(g.input("position", INT64, ["B"]), 1)
    frame_ring = g.input("frame_position", INT64, ["B", cfg.frame_ring])
    query_ring = g.input("query_position", INT64, ["B", cfg.query_ring])
    n_frames = g.size(frames, 1)
    n_queries = g.add("Div", n_frames, g.const([FRAMES_PER_QUERY]))
    every = g.count(n_queries)
    frame = g.add("Add", position, g.count(n_frames))
    first_frame = g.add("Add", position, g.add("Mul", every, g.const(FRAMES_PER_QUERY)))
    query = g.add("Div", first_frame, g.const(FRAMES_PER_QUERY))
    follow = g.add("Sub", g.add("Sub", n_queries, g.const([1])), every)
    phase = g.add("Min", follow, g.const(cfg.n_phases - 1))
    asked = g.add("Gather", g.const(w["queries"]), phase, axis=0)  # (Q, D)
    shape = g.concat(g.size(frames, 0), n_queries, g.const([cfg.width]), axis=0)
    x = str(g.add("Expand", asked, shape))
    frame_at = g.concat(frame_ring, frame, axis=1)
    query_at = g.concat(query_ring, query, axis=1)
    for i in range(cfg.n_layers):
        part = {k.removeprefix(f"layers.{i}."): v for k, v in w.items()}
        x = _attend(g, cfg, part, f"self_{{}}_{i}", x, None, (query_at, query, cfg.query_ring))
        seen = (frame_at, first_frame, cfg.frame_ring)
        x = _attend(g, cfg, part, f"cross_{{}}_{i}", x, frames, seen)
        normed = _normed(g, part, "norm", x)
        hidden = g.linear(normed, part["fc1.weight"])
        hidden = g.add("BiasGelu", hidden, g.const(part["fc1.bias"]))
        x = str(g.add("Add", x, g.linear(hidden, part["fc2.weight"], part["fc2.bias"])))
    return x


def _attend(
    g: Graph,
    cfg: QFormerConfig,
    part: Weights,
    name: str,
    x: str,
    source: str | None,
    seen: tuple[str, str, int],
) -> str:
    """x (B, Q, D) + attention over a ring and what is new; None: x itself is what is new.

    seen: places of all keys (B, L + T), of the queries (B, Q), and the ring's length.
    """
    key_at, query_at, reach = seen
    w = {k.removeprefix(f"{name.split('_')[0]}_attn."): v for k, v in part.items()}
    head_width = cfg.width // cfg.n_heads
    ring: Shape = ["B", cfg.n_heads, reach, head_width]
    past_k, past_v = g.ring(name.format("k"), ring), g.ring(name.format("v"), ring)
    normed = _normed(g, w, "norm", x)
    scale = head_width**-0.5
    q = g.heads(g.linear(normed, w["query.weight"] * scale, w["query.bias"] * scale), cfg.n_heads)
    new = x if source is None else source
    k = g.heads(g.linear(new, w["key.weight"]), cfg.n_heads)
    v = g.heads(g.linear(new, w["value.weight"], w["value.bias"]), cfg.n_heads)
    g.output("new_" + name.format("k"), k, ["B", cfg.n_heads, "N", head_width])
    g.output("new_" + name.format("v"), v, ["B", cfg.n_heads, "N", head_width])
    distance = g.add("Sub", g.unsqueeze(key_at, 1), g.unsqueeze(query_at, 2))  # (B, Q, L + T)
    clipped = g.add("Min", g.add("Max", distance, g.const(-reach)), g.const(reach))
    age = g.add("Add", clipped, g.const(reach))
    bias = g.transpose(g.add("Gather", g.const(w["bias"]), age, axis=1), 1, 0, 2, 3)
    bias = g.add("Add", bias, g.unsqueeze(_mask(g, key_at), 1, 2))
    keys, values = g.concat(past_k, k, axis=2), g.concat(past_v, v, axis=2)
    p = g.add("Softmax", g.add("Add", g.scores(q, keys), bias), axis=-1)
    mixed = g.merged(g.add("MatMul", p, values))
    return str(g.add("Add", x, g.linear(mixed, w["out.weight"], w["out.bias"])))


def _heard(g: Graph, w: Weights, log_probs: str, before: str) -> str:
    """What CTC heard anew, as embeddings (B, Q, E)."""
    posterior = g.add("Exp", log_probs)
    last = g.concat(before, g.slice(posterior, 0, -1, 1), axis=1)
    rise = g.add("Relu", g.add("Sub", posterior, last))
    pieces, maps = w["posterior.pieces"], w["posterior.maps"]
    heard = g.add("MatMul", rise, g.const(pieces))
    n_parts, width = maps.shape[0], maps.shape[1]
    stacked = g.reshape(heard, 0, -1, n_parts * width)
    return str(g.add("MatMul", stacked, g.const(maps.reshape(n_parts * width, -1))))


# --- the LLM --------------------------------------------------------------------------------------


def llm(cfg: LlmConfig, w: Weights, scales: Weights | None = None) -> Graph:
    """Appends rows to slots: x (M, E), rows of all slots one after another -> hidden (B', E).

    spread (B, S): row of x for each slot and place, any where there is none; pack (M, 2): slot and
    place of each row of x; last (B'): rows of x whose final-normed hidden is wanted; n_total (B):
    rows of a slot, the new ones included, less one; n_new (B): new rows of a slot; position (B, S):
    in its text, of each row; longest (1): L, places of the longest slot, the new ones included, and
    more than S; unseen (B, 1, S, L): added to a row's scores, of places before it or its own; k_i,
    v_i (B, KV, N, d): slots, written in place where the caller binds k_out_i, v_out_i to the same
    memory. They and the matrices are int8 with `scales` of k_i and v_i (1, KV, 1, d), else float32.
    Of k_i both channels of a pair that rotates have one scale.
    """
    g = Graph("llm", is_int8=scales is not None)
    x = g.input("x", FLOAT, ["M", cfg.width])
    spread = g.input("spread", INT64, ["B", "S"])
    pack, last = g.input("pack", INT64, ["M", 2]), g.input("last", INT64, ["R"])
    attend = _slot_attention(g, cfg, is_int8=scales is not None)
    first = g.const(w["layers.0.attn_norm.weight"])
    normed = g.add("SimplifiedLayerNormalization", x, first, epsilon=cfg.rms_eps, axis=-1)
    for i in range(cfg.n_layers):
        part = {k.removeprefix(f"layers.{i}."): v for k, v in w.items()}
        of_rows, of_mixed = _steps(cfg, scales, i)
        qkv = g.linear(normed, part["attn.qkv_proj"] * of_rows[:, None])
        rows = g.add("Gather", qkv, spread, axis=0)  # (B, S, ...)
        mixed = g.add("GatherND", attend(i, rows), pack)
        if scales is not None:
            mixed = g.add("Mul", mixed, g.const(of_mixed))
        out = g.linear(mixed, part["attn.o_proj.weight"])
        normed, x = _add_rms_norm(g, cfg, out, x, part["mlp_norm.weight"])
        both = g.linear(normed, part["mlp.gate_up_proj"])
        gate, up = g.add("Split", both, axis=-1, num_outputs=2, outputs=2)
        hidden = g.add("Mul", g.add("QuickGelu", gate, alpha=1.0), up)  # SiLU
        out = g.linear(hidden, part["mlp.down_proj.weight"])
        is_last = i + 1 == cfg.n_layers
        after = w["norm.weight"] if is_last else w[f"layers.{i + 1}.attn_norm.weight"]
        normed, x = _add_rms_norm(g, cfg, out, x, after)
    g.output("hidden", g.add("Gather", normed, last, axis=0), ["R", cfg.width])
    return g


def _steps(cfg: LlmConfig, scales: Weights | None, i: int) -> tuple[Floats, Floats]:
    """Factors of layer i's q, k and v (Q + K + V,), by which k and v count the steps of their 8
    bits and q k stays as it is, and of what is mixed of the v (Q,)."""
    n_q, n_kv = cfg.n_heads * cfg.head_width, cfg.n_kv_heads * cfg.head_width
    if scales is None:
        return np.ones(n_q + 2 * n_kv, np.float32), np.ones(n_q, np.float32)
    k, v = (scales[f"{part}_{i}"][0, :, 0] for part in "kv")  # (KV, d)
    of_q, of_mixed = (np.repeat(x, cfg.n_heads // cfg.n_kv_heads, axis=0).ravel() for x in (k, v))
    return np.concatenate([of_q, 1 / k.ravel(), 1 / v.ravel()]).astype(np.float32), of_mixed


def _slot_attention(g: Graph, cfg: LlmConfig, *, is_int8: bool) -> Callable[[int, str], str]:
    """Layer and rows (B, S, Q + K + V) of all slots -> (B, S, Q): K and V go into the slots.

    In int8 a step is 1: numbers with steps of their own for every channel take a tenth longer.
    """
    n_places = places(cfg.n_slot)
    n_total, n_new = g.input("n_total", INT32, ["B"]), g.input("n_new", INT32, ["B"])
    position = g.input("position", INT64, ["B", "S"])
    longest, unseen = g.input("longest", INT32, [1]), g.input("unseen", FLOAT, ["B", 1, "S", "L"])
    rope = _rope(g, cfg, n_places)
    head: dict[str, int | str] = {"num_heads": cfg.n_heads, "kv_num_heads": cfg.n_kv_heads}
    head["do_rotary"] = 1
    step = ""
    if is_int8:
        head |= {f"{part}_quant_type": "PER_TENSOR" for part in "kv"} | {"kv_cache_bit_width": 8}
        step = g.const(np.ones(1, np.float32))
    kind = INT8 if is_int8 else FLOAT
    slot: Shape = ["B", cfg.n_kv_heads, n_places, cfg.head_width]

    def attend(i: int, rows: str) -> str:
        past = [g.input(f"{x}_{i}", kind, slot) for x in "kv"]
        new = [g.declare(f"{x}_out_{i}", kind, slot) for x in "kv"]
        inputs = [rows, "", "", *past, n_total, longest, *rope, position, unseen, "", step, step]
        mixed = f"mixed_{i}"
        g.add("GroupQueryAttention", *inputs, "", "", n_new, outputs=[mixed, *new], **head)
        return mixed

    return attend


def _rope(g: Graph, cfg: LlmConfig, n_places: int) -> tuple[str, str]:
    """Cosines and sines (N, d / 2) of rotary positions (Su et al., 2021)."""
    half = np.arange(0, cfg.head_width, 2) / cfg.head_width
    angle = np.outer(np.arange(n_places), cfg.rope_theta**-half)
    return g.const(np.cos(angle)), g.const(np.sin(angle))


def vocabulary(weight: Floats, *, is_int8: bool = False) -> Graph:
    """hidden (R, E) -> logits (R, V): for writers that let the LLM choose among all tokens."""
    g = Graph("vocabulary", is_int8=is_int8)
    hidden = g.input("hidden", FLOAT, ["R", weight.shape[1]])
    g.output("logits", g.linear(hidden, weight), ["R", weight.shape[0]])
    return g


def plain(weight: Floats, bias: Floats, *, is_int8: bool = False) -> Graph:
    """hidden (R, E) -> log sum of exp of the logits (R,) of the tokens that plain text uses (U)."""
    g = Graph("plain", is_int8=is_int8)
    logits = g.linear(g.input("hidden", FLOAT, ["R", weight.shape[1]]), weight, bias)
    everything = g.add("ReduceLogSumExp", logits, g.const([-1]), keepdims=0)
    g.output("log_sum", everything, ["R"])
    return g


# --- what they share ------------------------------------------------------------------------------


def _norm(g: Graph, w: Weights, name: str) -> tuple[str, str]:
    return g.const(w[f"{name}.weight"]), g.const(w[f"{name}.bias"])


def _mask(g: Graph, position: str) -> str:
    """0 where something was written (position 0 or more), else UNSEEN."""
    is_seen = g.add("GreaterOrEqual", position, g.const(0))
    return str(g.add("Where", is_seen, g.const(0.0), g.const(UNSEEN)))


def _add_norm(g: Graph, y: str, x: str, norm: tuple[str, str], bias: Floats) -> tuple[str, str]:
    """LayerNorm(x + y + bias), x + y + bias; one operator for both takes four times as long."""
    added = g.add("Add", g.add("Add", y, g.const(bias)), x)
    return g.add("LayerNormalization", added, *norm, epsilon=EPS, axis=-1), added


def _add_rms_norm(g: Graph, cfg: LlmConfig, y: str, x: str, weight: Floats) -> tuple[str, str]:
    """RmsNorm(x + y), x + y."""
    added, op = g.add("Add", y, x), "SimplifiedLayerNormalization"
    return g.add(op, added, g.const(weight), epsilon=cfg.rms_eps, axis=-1), added
