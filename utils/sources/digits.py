"""The stand-in: a data set that comes with scikit-learn and needs no network."""

from __future__ import annotations

import numpy as np

from utils.sources import Arrays

TEST_IMAGES_PER_CLASS = 30


def load() -> Arrays:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8x8 to 32x32 RGB. 300 of them are the test set."""
    from sklearn.datasets import load_digits  # slow to import and rarely needed

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # values 0 to 16
    images = pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3)
    labels = digits.target.astype(np.int64)
    rng = np.random.default_rng(0)
    is_test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        is_test[rng.choice(np.flatnonzero(labels == digit), TEST_IMAGES_PER_CLASS, replace=False)] = True
    return Arrays(images[~is_test], labels[~is_test], images[is_test], labels[is_test], tuple("0123456789"))
