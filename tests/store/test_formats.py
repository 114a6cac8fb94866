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
from store import dtypes as formats
from store.config import Dtype
from store.dtypes import (
    KNEE,
    STORED_DTYPE,
    bytes_per_token,
    channel_rms,
    decode,
    decode_numpy,
)
from store.errors import JobError

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16", "int8")
SHAPES = array_shapes(min_dims=3, max_dims=3, max_side=5)
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


def assert_int8_bound(tokens: np.ndarray, rms: np.ndarray) -> None:
    """|error| <= (|q| + KNEE / 2 + 0.5) * scale * rms for every value, except for the rounding of float32 itself."""
    encoded = encode(tokens, "int8", rms)
    assert encoded.scale is not None
    decoded = decode_numpy(encoded, "int8", rms).astype(np.float64)
    exact, rms64 = tokens.astype(np.float64), rms.astype(np.float64)
    codes = np.abs(encoded.values.astype(np.float64))
    bound = (codes + KNEE / 2 + 0.5) * encoded.scale[..., None].astype(np.float64) * rms64
    slack = 2**-21 * formats.LARGEST * encoded.scale[..., None].astype(np.float64) * rms64 + 2**-148
    assert np.isfinite(decoded).all()
    assert (np.abs(decoded - exact) <= bound + slack).all()


@given(TOKENS)
def test_int8_stays_within_half_a_step(tokens: np.ndarray) -> None:
    assert_int8_bound(tokens, rms_of(tokens))


@given(TOKENS, st.data())
def test_int8_stays_within_half_a_step_with_the_rms_of_other_samples(tokens: np.ndarray, data: st.DataObject) -> None:
    rms = data.draw(arrays(np.float32, tokens.shape[-1], elements=st.floats(2**-20, 2**10, width=32)))
    assert_int8_bound(tokens, rms)


@given(arrays(np.float32, (2, 3, 4), elements=float32(2**-126)))
def test_int8_keeps_subnormal_tokens_within_half_a_step(tokens: np.ndarray) -> None:
    assert_int8_bound(tokens, rms_of(tokens))
    assert_int8_bound(tokens, np.ones(4, np.float32))


@given(arrays(np.float32, (2, 3, 1), elements=float32(LARGEST)))
def test_int8_of_one_channel_is_nearly_exact(tokens: np.ndarray) -> None:
    assert_int8_bound(tokens, rms_of(tokens))


@pytest.mark.parametrize("largest", [1.7e38, 1e30])
def test_int8_of_enormous_values_stays_finite(largest: float) -> None:
    assert_int8_bound(np.array([[[largest, -largest, 1.0]]], np.float32), np.array([7, 1, 1], np.float32))


@pytest.mark.parametrize("largest", [3.4028234e38, 1.8e38])
def test_int8_refuses_values_that_a_rounded_step_would_overflow(largest: float) -> None:
    with pytest.raises(JobError, match=r"sample '0', layer 0, token 0, channel 1: .* cannot be stored as int8"):
        encode(np.array([[[1.0, -largest]]], np.float32), "int8", np.ones(2, np.float32))


def test_zero_tokens_decode_to_zeros() -> None:
    tokens = np.zeros((2, 3, 4), np.float32)
    for dtype in DTYPES:
        decoded = decode_numpy(encode(tokens, dtype, np.ones(4, np.float32)), dtype, np.ones(4, np.float32))
        np.testing.assert_array_equal(decoded, tokens)


def test_one_massive_channel_costs_the_others_nothing_in_int8() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.normal(size=(8, 16, 64)).astype(np.float32)
    massive = tokens.copy()
    massive[..., 41] *= 500
    plain, other = ({"tokens": t, "rms": rms_of(t)} for t in (tokens, massive))
    errors = []
    for case in (plain, other):
        decoded = decode_numpy(encode(case["tokens"], "int8", case["rms"]), "int8", case["rms"])
        errors.append(np.delete(decoded - case["tokens"], 41, axis=-1))
    assert np.linalg.norm(errors[1]) < 1.01 * np.linalg.norm(errors[0])


@pytest.mark.parametrize("dtype", DTYPES)
@given(tokens=TOKENS)
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


def test_int8_without_rms_is_refused() -> None:
    with pytest.raises(ValueError, match="int8 needs the per-channel rms"):
        encode(np.ones((1, 1, 1), np.float32), "int8")


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
    encoded = encode(np.ones((3, 5, 7), np.float32), dtype, np.ones(7, np.float32))
    n_bytes = encoded.values.nbytes + (0 if encoded.scale is None else encoded.scale.nbytes)
    assert encoded.values.dtype == STORED_DTYPE[dtype]
    assert bytes_per_token(dtype, 7) == n_bytes / 15


def test_bfloat16_bits_are_those_of_ml_dtypes() -> None:
    tokens = np.array([[[1.0, -2.5, 3.14159]]], np.float32)
    bits = encode(tokens, "bfloat16").values
    np.testing.assert_array_equal(bits.view(ml_dtypes.bfloat16), tokens.astype(ml_dtypes.bfloat16))
