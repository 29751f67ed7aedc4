"""Inexact sums are found for every operator."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from octav_hf.export.integer_products import wrong_products

RANDOM = np.random.default_rng(0)
LEFT = RANDOM.integers(0, 256, (2, 5, 64)).astype(np.uint8)
RIGHT = RANDOM.integers(-127, 128, (64, 7)).astype(np.int8)
SUMS = (LEFT.astype(np.int64) - 128) @ RIGHT.astype(np.int64)
SCALES = np.float32(0.05), RANDOM.random(7).astype(np.float32)


def wrong(node: onnx.NodeProto, **values: np.ndarray) -> list[str]:
    given = {"a": LEFT, "b": RIGHT, "za": np.uint8(128), "zb": np.int8(0), "sa": SCALES[0], "sb": SCALES[1], **values}
    model = helper.make_model(helper.make_graph([node], "graph", [], []))
    return list(wrong_products(model, lambda names: {name: given[name] for name in names}))


def saturated() -> np.ndarray:
    """Sums whose pairs are clamped to 16 bits, as by vpmaddubsw."""
    products = (LEFT.astype(np.int64)[..., None]) * RIGHT.astype(np.int64)
    pairs = (products[..., ::2, :] + products[..., 1::2, :]).clip(-(2**15), 2**15 - 1)
    return pairs.sum(-2) - 128 * RIGHT.astype(np.int64).sum(0)


@pytest.mark.parametrize("sums", [SUMS, saturated()], ids=["exact", "saturated"])
def test_scaled_sums(sums: np.ndarray) -> None:
    node = helper.make_node("MatMulIntegerToFloat", ["a", "b", "sa", "sb", "za", "zb"], ["y"], "product")
    found = wrong(node, y=sums.astype(np.float32) * (SCALES[0] * SCALES[1]))
    different = int((sums != SUMS).sum())
    assert bool(found) == bool(different)
    assert not found or found[0].startswith(f"product (MatMulIntegerToFloat): {different} of {SUMS.size} sums")


def test_one_too_many_in_one_sum() -> None:
    node = helper.make_node("MatMulInteger", ["a", "b", "za", ""], ["y"], "product")
    assert wrong(node, y=SUMS.astype(np.int32)) == []
    other = SUMS.astype(np.int32)
    other[1, 2, 3] += 1
    assert wrong(node, y=other) == ["product (MatMulInteger): 1 of 70 sums are not exact, the worst by 1"]


def test_sums_that_are_quantized_again() -> None:
    node = helper.make_node("QLinearMatMul", ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"], ["y"], "product")
    scale, zero_point = np.float32(60), np.uint8(128)
    exact = SUMS * SCALES[0].astype(np.float64) * SCALES[1].astype(np.float64) / 60 + 128
    codes = np.rint(exact).clip(0, 255).astype(np.uint8)
    assert wrong(node, y=codes, sy=scale, zy=zero_point) == []
    codes[0, 0, 0] += 1
    assert len(wrong(node, y=codes, sy=scale, zy=zero_point)) == 1


def test_convolutions() -> None:
    x, weight = LEFT.reshape(1, 4, 8, 20), RIGHT[:48].reshape(-1)[:324].reshape(9, 4, 3, 3)
    sizes = {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 0, 2, 3], "group": 1}
    node = helper.make_node("ConvInteger", ["a", "b", "za"], ["y"], "product", **sizes)
    # In int64, element by element.
    padded = np.pad(x.astype(np.int64) - 128, [(0, 0), (0, 0), (1, 2), (0, 3)])
    rows, columns = (padded.shape[2] - 3) // 2 + 1, padded.shape[3] - 4
    y = np.zeros((1, 9, rows, columns), np.int32)
    for row in range(rows):
        for column in range(columns):
            window = padded[0, :, 2 * row : 2 * row + 3, column : column + 5 : 2]
            y[0, :, row, column] = (weight.astype(np.int64) * window).sum((1, 2, 3))
    assert wrong(node, a=x, b=weight, y=y) == []
    y[0, 0, 0, 0] -= 1
    assert len(wrong(node, a=x, b=weight, y=y)) == 1


def test_known_operands_need_not_be_run() -> None:
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"], "product")
    stored = [helper.make_tensor("b", TensorProto.INT8, RIGHT.shape, RIGHT.tobytes(), raw=True)]
    model = helper.make_model(helper.make_graph([node], "graph", [], [], stored))
    values = {"a": LEFT, "y": LEFT.astype(np.int64) @ RIGHT.astype(np.int64)}
    assert list(wrong_products(model, lambda names: {name: values[name] for name in names})) == []
