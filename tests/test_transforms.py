"""The two pipelines compared with each other, and normalization with its definition."""

import warnings

import albumentations as A
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from utils import transforms
from utils.transforms import MEAN, MEAN_PIXEL, STD, BatchAugment, Draws, denormalize, normalize, train_transform

LEVEL = 1e-4  # seeds are fixed, so the tests always give the same result


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def with_albumentations(images, seed, **options):
    """The reference pipeline's output, (N, 3, 32, 32) float32, and what it drew."""
    pipeline = A.Compose(train_transform(**options).transforms, seed=seed, save_applied_params=True)
    outputs, rows = [], []
    for image in images:
        result = pipeline(image=image)
        applied = dict(result["applied_transforms"])
        x, y = applied["RandomCrop"]["crop_coords"][:2]
        hole_x, hole_y = applied["CoarseDropout"]["holes"][0][:2] if "CoarseDropout" in applied else (0, 0)
        outputs.append(result["image"])
        rows.append((y, x, "HorizontalFlip" in applied, int(hole_y), int(hole_x)))
    crop_y, crop_x, flips, hole_y, hole_x = torch.tensor(rows).T
    return torch.stack(outputs), Draws(crop_y, crop_x, flips.bool(), hole_y, hole_x)


@given(st.integers(0, 2**32 - 1), st.integers(0, 15), st.booleans(), st.integers(0, 32))
@settings(max_examples=40)
def test_for_equal_draws_both_pipelines_give_equal_pixels(seed, pad, flip, cutout):
    options, images = dict(pad=pad, flip=flip, cutout=cutout), random_images(4, seed)
    expected, draws = with_albumentations(images, seed, **options)
    pixels = BatchAugment(**options).apply(torch.from_numpy(images), torch.arange(4), draws)
    np.testing.assert_array_equal(pixels.numpy(), denormalize(expected))
    torch.testing.assert_close(normalize(pixels), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def free_draws():
    """3,000 free draws of each pipeline, (3000, 5) int64: crop y and x, flip, hole y and x."""
    _, of_albumentations = with_albumentations(random_images(1).repeat(3000, axis=0), seed=1)
    of_batched = BatchAugment().draw(3000, torch.Generator().manual_seed(1))
    return [torch.stack([each.long() for each in draws], dim=1).numpy() for draws in (of_albumentations, of_batched)]


# Columns of the draws; pairs show that two choices are independent.
@pytest.mark.parametrize("columns", [(0,), (1,), (2,), (3,), (4,), (0, 1), (1, 2), (3, 4), (0, 3)])
def test_free_draws_of_both_pipelines_share_one_distribution(free_draws, columns):
    sizes = [(9, 9, 2, 25, 25)[column] for column in columns]  # 4 pixels on each side; the hole reaches every edge
    cells = [np.ravel_multi_index(draws[:, columns].T, sizes) for draws in free_draws]
    counts = [np.bincount(cell, minlength=np.prod(sizes)) for cell in cells]
    assert chi2_contingency(counts).pvalue > LEVEL
    assert all(chisquare(count).pvalue > LEVEL for count in counts)  # and it is the uniform one


def test_the_augmentation_is_the_assignments():
    image = random_images(1)
    padded = np.pad(image[0], ((4, 4), (4, 4), (0, 0)), mode="reflect")
    draws = Draws(*torch.tensor([[0, 8], [8, 3], [0, 1], [2, 24], [5, 0]]))
    found = BatchAugment().apply(
        torch.from_numpy(image), torch.zeros(2, dtype=torch.int64), draws._replace(flips=draws.flips.bool())
    )
    expected = np.stack([padded[0:32, 8:40], padded[8:40, 3:35][:, ::-1]])
    expected[0, 2:10, 5:13] = expected[1, 24:32, 0:8] = MEAN_PIXEL  # cutout 8x8
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_allclose(MEAN_PIXEL, 255 * np.array(MEAN), atol=0.5)


def test_the_reference_pipelines_return_normalized_chw_floats_without_a_warning():
    image = random_images(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for transform in (train_transform(seed=0), transforms.test_transform()):
            result = transform(image=image)["image"]
            assert (result.shape, result.dtype) == ((3, 32, 32), torch.float32)
    np.testing.assert_array_equal(denormalize(result), image)  # the test pipeline only normalizes


def test_an_outdated_albumentations_argument_is_an_error_here():
    # The library itself only warns, and cuts holes of another size.
    with pytest.raises(UserWarning, match="not valid for transform"):
        A.CoarseDropout(max_holes=1, max_height=8, max_width=8, p=1.0)


def test_normalize_follows_its_definition_and_denormalize_is_its_exact_inverse():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    pixels = np.concatenate([values, values[:, ::-1], values[:, :, ::-1]], axis=3)  # all values in every channel
    normalized = normalize(torch.from_numpy(pixels))
    by_definition = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(normalized.permute(0, 2, 3, 1).numpy(), by_definition, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(denormalize(normalized), pixels)
    np.testing.assert_array_equal(denormalize(normalized[0]), pixels[0])


def test_mean_and_std_are_those_of_the_real_train_set(cifar10):
    pixels = cifar10.train_images.reshape(-1, 3)
    values = np.arange(256) / 255
    shares = np.stack([np.bincount(channel, minlength=256) / len(pixels) for channel in pixels.T])  # (3, 256)
    mean, square = shares @ values, shares @ values**2
    np.testing.assert_array_equal(mean.round(4), MEAN)
    np.testing.assert_array_equal(np.sqrt(square - mean**2).round(4), STD)
