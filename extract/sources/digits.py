"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: real data that need no files."""

import numpy as np
from sklearn.datasets import load_digits

from extract.config import DataConfig
from extract.sources.samples import Encoded, Listing, Sample, choose_test


def list_digits(config: DataConfig) -> Listing:
    choose_test((), config)
    bunch = load_digits()
    gray = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # (samples, 8, 8), from 0..16
    # As PGM, whose bytes, unlike a compressed format's, no library version can change: they are digested.
    samples = [
        Sample(f"digits/{row:04d}", (str(label),), Encoded(b"P5 8 8 255\n" + pixels.tobytes()))
        for row, (pixels, label) in enumerate(zip(gray, bunch.target, strict=True))
    ]
    return Listing("digits", samples, None, classes=tuple(str(digit) for digit in range(10)))
