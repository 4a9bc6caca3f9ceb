"""graph.py: products of whole numbers lose little, and rows of them are alone."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from sparqle_stream.onnx_cpu.graph import FLOAT, LARGEST_WEIGHT, Graph, quantize_rows


def matrix(n_out, n_in, seed=0):
    return np.random.default_rng(seed).standard_normal((n_out, n_in)).astype(np.float32)


def test_rows_are_close_to_the_matrix():
    """Half a step of 63 from the largest number of a row, whatever the others are."""
    weight = matrix(7, 40)
    weight[2] *= 1e-4
    weight[3] = 0.0
    q, scale = quantize_rows(weight)
    assert np.abs(q).max() == LARGEST_WEIGHT
    largest = np.abs(weight).max(axis=1, keepdims=True)
    error = np.abs(q * scale[:, None] - weight)
    assert (error <= largest * 0.501 / LARGEST_WEIGHT).all()


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
