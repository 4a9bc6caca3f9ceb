"""blocks.py: what MatMulNBits reads is what was meant, and little is lost."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from sparqle_stream.errors import ModelError
from sparqle_stream.onnx_cpu.blocks import BLOCK, quantize_blocks
from sparqle_stream.onnx_cpu.graph import FLOAT, Graph

SHARE = {4: 0.1, 8: 0.006}  # of the largest weight in a block: half a step, and some clipping


def matrix(n_out, n_in, seed=0):
    return np.random.default_rng(seed).standard_normal((n_out, n_in)).astype(np.float32)


def unpacked(blocks, bits):
    """(out, in) float32 of the stored bytes, written down again from their description."""
    q = blocks.q
    if bits == 4:
        q = np.stack([q & 15, q >> 4], axis=-1).reshape(*q.shape[:2], -1)
        zero = np.stack([blocks.zero & 15, blocks.zero >> 4], axis=-1)
        zero = zero.reshape(len(q), -1)[:, : q.shape[1], None].astype(np.float32)
    else:
        zero = 128.0
    return ((q - zero) * blocks.scale[..., None]).reshape(len(q), -1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n_in", [32, 64, 96])
def test_blocks_are_close_to_the_matrix(bits, n_in):
    weight = matrix(7, n_in)
    weight[2] *= 1e-4  # a small row keeps its precision
    weight[3] = 0.0
    weight[4] = np.abs(weight[4])  # a block of one sign
    blocks = quantize_blocks(weight, bits)
    largest = np.abs(weight.reshape(7, -1, BLOCK)).max(axis=2).repeat(BLOCK, axis=1)
    assert (np.abs(unpacked(blocks, bits) - weight) <= SHARE[bits] * 2 * largest + 1e-9).all()
    assert (unpacked(blocks, bits)[3] == 0.0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_runtime_reads_them_so(bits):
    weight, x = matrix(24, 96), matrix(5, 96, seed=1)
    g = Graph("product")
    g.output("y", g.low_bit_linear(g.input("x", FLOAT, ["M", 96]), weight, bits), ["M", 24])
    session = ort.InferenceSession(g.model().SerializeToString())
    got = session.run(None, {"x": x})[0]
    expected = x @ unpacked(quantize_blocks(weight, bits), bits).T
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()  # x is rounded too


def test_searching_a_range_beats_taking_all_of_it():
    """One weight far from the others: clipping it is cheaper than coarse steps for all."""
    weight = matrix(64, 32)
    weight[:, 0] = 4.5
    found = unpacked(quantize_blocks(weight, 4), 4)
    low, high = weight.min(axis=1, keepdims=True), weight.max(axis=1, keepdims=True)
    scale = (high - low) / 15.0
    zero = np.rint(-low / scale)
    plain = ((np.rint(weight / scale) + zero).clip(0, 15) - zero) * scale
    assert np.square(found - weight).sum() < 0.95 * np.square(plain - weight).sum()


def test_a_matrix_without_whole_blocks_is_refused():
    with pytest.raises(ModelError, match="33 numbers"):
        quantize_blocks(matrix(4, 33), 4)
