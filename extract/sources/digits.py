"""Lists scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: real data that need no download."""

import numpy as np
from sklearn.datasets import load_digits

from extract.config import DataConfig
from extract.sources.samples import FileBytes, Sample, SourceSamples
from extract.sources.splits import choose_splits


def list_digits(config: DataConfig) -> SourceSamples:
    """All digits as training samples, from which the test split is drawn."""
    choose_splits((), config)
    bunch = load_digits()
    gray = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # (samples, 8, 8), from 0..16
    # As PGM, which is not compressed: the bytes, and so the digests, are the same with every library version.
    samples = [
        Sample(f"digits/{row:04d}", (str(label),), FileBytes(b"P5 8 8 255\n" + pixels.tobytes()))
        for row, (pixels, label) in enumerate(zip(gray, bunch.target, strict=True))
    ]
    classes = tuple(str(digit) for digit in range(10))
    return SourceSamples(name="digits", train=samples, test=None, classes=classes)
