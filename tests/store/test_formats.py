"""Stored formats: the error bound of each, and the values that they refuse."""

import re

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from benchmarks.made_up import encode
from extract.forward.encoding import rounding_error
from store.config import Dtype
from store.dtypes import (
    CODES,
    STORED_DTYPE,
    block_size,
    bytes_per_token,
    channel_rms,
    decode,
    decode_numpy,
    stored_width,
)
from store.errors import JobError

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16", "int8", "int4")
SHAPES = array_shapes(min_dims=3, max_dims=3, max_side=5)
SHAPES_OF_CODES = SHAPES.map(lambda shape: (*shape[:2], 4 * shape[2]))
LARGEST = 60_000.0  # below the overflow of float16


def float32(largest: float) -> st.SearchStrategy[float]:
    return st.floats(-largest, largest, width=32, allow_subnormal=True)


TOKENS = SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=float32(LARGEST)))


def rms_of(tokens: np.ndarray) -> np.ndarray:
    return channel_rms(np.mean(tokens.astype(np.float64) ** 2, axis=(0, 1)))


@given(TOKENS)
def test_float32_is_exact(tokens: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_numpy(encode(tokens, "float32"), "float32", None), tokens)


@pytest.mark.parametrize(("dtype", "unit", "smallest"), [("float16", 2**-11, 2**-25), ("bfloat16", 2**-8, 2**-134)])
@given(tokens=TOKENS)
@settings(max_examples=60)
def test_two_byte_formats_round_to_the_nearest(dtype: Dtype, unit: float, smallest: float, tokens: np.ndarray) -> None:
    decoded = decode_numpy(encode(tokens, dtype), dtype, None).astype(np.float64)
    exact = tokens.astype(np.float64)
    assert (np.abs(decoded - exact) <= np.maximum(unit * np.abs(exact), smallest)).all()


def assert_bound(tokens: np.ndarray, dtype: Dtype, rms: np.ndarray) -> None:
    """No value moves by more than `rounding_error` says, except for the rounding of float32 itself."""
    decoded = decode_numpy(encode(tokens, dtype, rms), dtype, rms)
    assert np.isfinite(decoded).all()
    bound = rounding_error(torch.from_numpy(decoded), dtype, torch.from_numpy(rms)).double().numpy()
    relative = np.abs(tokens.astype(np.float64)) / rms
    slack = 2**-20 * relative.max(axis=-1, keepdims=True) * rms.astype(np.float64) + 2**-147
    assert (np.abs(decoded.astype(np.float64) - tokens) <= bound + slack).all()


@pytest.mark.parametrize("dtype", CODES)
@given(arrays(np.float32, SHAPES_OF_CODES, elements=float32(LARGEST)))
def test_codes_stay_within_half_a_step(dtype: Dtype, tokens: np.ndarray) -> None:
    assert_bound(tokens, dtype, rms_of(tokens))


@pytest.mark.parametrize("dtype", CODES)
@given(arrays(np.float32, SHAPES_OF_CODES, elements=float32(LARGEST)), st.data())
def test_codes_stay_within_half_a_step_with_the_rms_of_other_samples(
    dtype: Dtype, tokens: np.ndarray, data: st.DataObject
) -> None:
    smallest = 2**-20 if dtype == "int8" else 2**-5  # of int4 the largest relative value is 77 times that of float16
    rms = data.draw(arrays(np.float32, tokens.shape[-1], elements=st.floats(smallest, 2**10, width=32)))
    assert_bound(tokens, dtype, rms)


@pytest.mark.parametrize("dtype", CODES)
@given(arrays(np.float32, (2, 3, 4), elements=float32(2**-126)))
def test_codes_keep_subnormal_tokens_within_half_a_step(dtype: Dtype, tokens: np.ndarray) -> None:
    assert_bound(tokens, dtype, rms_of(tokens))
    assert_bound(tokens, dtype, np.ones(4, np.float32))


@given(arrays(np.float32, (2, 3, 1), elements=float32(LARGEST)))
def test_int8_of_one_channel_is_nearly_exact(tokens: np.ndarray) -> None:
    assert_bound(tokens, "int8", rms_of(tokens))


def test_the_largest_value_of_a_token_or_block_is_nearly_exact() -> None:
    tokens = np.random.default_rng(0).normal(size=(4, 3, 64)).astype(np.float32)
    rms, largest = rms_of(tokens), {"int8": 64, "int4": 32}
    for dtype, channels in largest.items():
        relative = tokens / rms
        decoded = decode_numpy(encode(tokens, dtype, rms), dtype, rms) / rms
        groups = np.abs(relative).reshape(4, 3, -1, channels)
        at_largest = np.take_along_axis(
            (decoded - relative).reshape(groups.shape), groups.argmax(axis=-1)[..., None], axis=-1
        )
        np.testing.assert_array_less(np.abs(at_largest[..., 0]), 2**-10 * groups.max(axis=-1))


@pytest.mark.parametrize("largest", [1.7e38, 1e30])
def test_int8_of_enormous_values_stays_finite(largest: float) -> None:
    assert_bound(np.array([[[largest, -largest, 1.0]]], np.float32), "int8", np.array([7, 1, 1], np.float32))


@pytest.mark.parametrize(
    ("dtype", "largest"), [("int8", 3.4028234e38), ("int8", 1.8e38), ("int4", 3.4028234e38), ("int4", 5.1e6)]
)
def test_values_whose_scale_would_overflow_are_refused(dtype: Dtype, largest: float) -> None:
    message = rf"sample '0', layer 0, token 0, channel 1: .* cannot be stored as {dtype}; choose store.dtype bfloat16"
    with pytest.raises(JobError, match=message):
        encode(np.array([[[1.0, -largest, 0, 0]]], np.float32), dtype, np.ones(4, np.float32))


def test_the_blocks_of_int4_are_as_documented() -> None:
    """64 channels are two blocks: a float16 scale, then bytes of the codes of channels k and k + 16."""
    tokens = np.zeros((1, 1, 64), np.float32)
    tokens[0, 0, [0, 1, 16, 17, 32]] = [77, -12, 5, -77, 154]  # codes 7, -2, 1, -7 at scale 1; 7 at scale 2
    (stored,) = encode(tokens, "int4", np.ones(64, np.float32)).values[0]
    assert stored.dtype == np.uint8
    blocks = stored.reshape(2, 18)
    np.testing.assert_array_equal(blocks[:, :2].copy().view("<f2")[:, 0], [1, 2])
    np.testing.assert_array_equal(blocks[:, 2:4], [[0x17, 0x9E], [0x07, 0x00]])
    assert not blocks[:, 4:].any()


@pytest.mark.parametrize(
    ("dim", "block"), [(192, 32), (1408, 32), (8, 8), (48, 24), (36, 12), (4, 4), (34, 0), (7, 0), (1, 0), (20, 20)]
)
def test_a_block_is_the_largest_multiple_of_four_that_divides_the_width(dim: int, block: int) -> None:
    assert block_size(dim) == block


def test_zero_tokens_decode_to_zeros() -> None:
    tokens = np.zeros((2, 3, 4), np.float32)
    for dtype in DTYPES:
        decoded = decode_numpy(encode(tokens, dtype, np.ones(4, np.float32)), dtype, np.ones(4, np.float32))
        np.testing.assert_array_equal(decoded, tokens)


@pytest.mark.parametrize("dtype", CODES)
def test_one_massive_channel_costs_the_others_nothing(dtype: Dtype) -> None:
    draw = np.random.default_rng(0)
    tokens = draw.normal(size=(8, 16, 64)).astype(np.float32)
    massive = tokens.copy()
    massive[..., 41] *= 500
    plain, other = ({"tokens": t, "rms": rms_of(t)} for t in (tokens, massive))
    errors = []
    for case in (plain, other):
        decoded = decode_numpy(encode(case["tokens"], dtype, case["rms"]), dtype, case["rms"])
        errors.append(np.delete(decoded - case["tokens"], 41, axis=-1))
    assert np.linalg.norm(errors[1]) < 1.01 * np.linalg.norm(errors[0])


@pytest.mark.parametrize("dtype", DTYPES)
@given(tokens=arrays(np.float32, SHAPES_OF_CODES, elements=float32(LARGEST)))
@settings(max_examples=30)
def test_numpy_and_torch_decode_the_same_bits(dtype: Dtype, tokens: np.ndarray) -> None:
    rms = rms_of(tokens)
    encoded = encode(tokens, dtype, rms)
    values = torch.from_numpy(encoded.values)
    if dtype == "bfloat16":
        values = values.view(torch.bfloat16)
    scale = None if encoded.scale is None else torch.from_numpy(encoded.scale)
    by_torch = decode(values, scale, torch.from_numpy(rms)).numpy()
    by_numpy = decode_numpy(encoded, dtype, rms)
    assert by_torch.dtype == by_numpy.dtype == np.float32
    np.testing.assert_array_equal(by_torch.view(np.uint32), by_numpy.view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_value_is_named_with_its_place(dtype: Dtype, value: float) -> None:
    tokens = np.ones((2, 3, 4), np.float32)
    tokens[1, 2, 3] = value
    place = "sample '1', layer 0, token 2, channel 3"
    with pytest.raises(
        JobError, match=rf"{place}: the value {value} cannot be stored as {dtype}; the backbone computed it"
    ):
        encode(tokens, dtype, np.ones(4, np.float32))


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65520.0), ("float16", -7e4), ("bfloat16", 3.4e38)])
def test_an_overflow_is_named_with_its_place(dtype: Dtype, value: float) -> None:
    tokens = np.ones((2, 3, 4), np.float32)
    tokens[1, 0, 2] = value
    message = f"sample '1', layer 0, token 0, channel 2: the value {value:g} cannot be stored as {dtype}; choose store"
    with pytest.raises(JobError, match=re.escape(message)):
        encode(tokens, dtype)


@pytest.mark.parametrize("dtype", CODES)
def test_codes_without_rms_are_refused(dtype: Dtype) -> None:
    with pytest.raises(ValueError, match=f"{dtype} needs the per-channel rms"):
        encode(np.ones((1, 1, 4), np.float32), dtype)


@given(arrays(np.float64, 4, elements=st.floats(0, 1e80)))
def test_a_channel_rms_can_always_be_divided_by(mean_square: np.ndarray) -> None:
    mean_square = np.minimum(mean_square, 1e76)  # the square of the largest float32
    rms = channel_rms(mean_square)
    assert rms.dtype == np.float32
    assert (rms > 0).all()
    assert np.isfinite(rms).all()


def test_a_channel_of_zeros_has_rms_one() -> None:
    np.testing.assert_array_equal(channel_rms(np.array([0.0, 4.0, 1e-300])), np.array([1, 2, 1], np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_per_token_are_those_of_the_encoded_arrays(dtype: Dtype) -> None:
    dim = 12 if dtype == "int4" else 7
    encoded = encode(np.ones((3, 5, dim), np.float32), dtype, np.ones(dim, np.float32))
    n_bytes = encoded.values.nbytes + (0 if encoded.scale is None else encoded.scale.nbytes)
    assert encoded.values.dtype == STORED_DTYPE[dtype]
    assert encoded.values.shape[-1] == stored_width(dtype, dim)
    assert bytes_per_token(dtype, dim) == n_bytes / 15


def test_bfloat16_bits_are_those_of_ml_dtypes() -> None:
    tokens = np.array([[[1.0, -2.5, 3.14159]]], np.float32)
    bits = encode(tokens, "bfloat16").values
    np.testing.assert_array_equal(bits.view(ml_dtypes.bfloat16), tokens.astype(ml_dtypes.bfloat16))
