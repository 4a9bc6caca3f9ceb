"""blocks.py: what MatMulNBits reads is what was meant, and little is lost."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from sparqle_stream.errors import ModelError
from sparqle_stream.onnx_cpu.blocks import BLOCK, LARGEST_OF_ROW, quantize_blocks, quantize_rows
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


def test_rows_are_close_to_the_matrix():
    """Half a step of 63 from the largest number of a row, whatever the others are."""
    weight = matrix(7, 40)
    weight[2] *= 1e-4
    weight[3] = 0.0
    q, scale = quantize_rows(weight)
    assert np.abs(q).max() == LARGEST_OF_ROW
    largest = np.abs(weight).max(axis=1, keepdims=True)
    error = np.abs(q * scale[:, None] - weight)
    assert (error <= largest * 0.501 / LARGEST_OF_ROW).all()


def int8_linear(weight, bias=None):
    g = Graph("linear", is_int8=True)
    x = g.input("x", FLOAT, ["M", weight.shape[1]])
    g.output("y", g.linear(x, weight, bias), ["M", len(weight)])
    return ort.InferenceSession(g.model().SerializeToString(), providers=["CPUExecutionProvider"])


def test_an_int8_product_is_close_to_the_float_one():
    weight, bias, x = matrix(48, 512), matrix(1, 48, 1)[0], matrix(28, 512, 2)
    x[5] *= 1e-3  # a quiet row beside loud ones
    x[6] = 0.0
    (y,) = int8_linear(weight, bias).run(None, {"x": x})
    expected = x @ weight.T + bias
    error = np.sqrt(np.square(y - expected).mean(axis=1))
    size = np.sqrt(np.square(x @ weight.T).mean(axis=1))
    assert (error <= 0.03 * size).all()  # 1.7 % on the whole: steps of 1/63 and of 1/127
    np.testing.assert_allclose(y[6], bias, atol=1e-6)


def test_a_row_of_an_int8_product_is_alone():
    """Bit for bit: no scale is shared, and sums of whole numbers know no order."""
    session, x = int8_linear(matrix(48, 512)), matrix(28, 512, 2)
    x[7] *= 1000.0
    (together,) = session.run(None, {"x": x})
    for i in (0, 6, 7, 27):
        (alone,) = session.run(None, {"x": x[i : i + 1]})
        assert np.array_equal(together[i], alone[0])


def test_no_sum_of_an_int8_product_saturates():
    """The largest numbers on both sides, in pairs, as the 16 bits of AVX2 add them."""
    weight, x = np.ones((8, 64), np.float32), np.ones((1, 64), np.float32)
    (y,) = int8_linear(weight).run(None, {"x": x})
    np.testing.assert_allclose(y, 64.0, rtol=1e-6)
