"""The two pipelines compared with each other, and normalization with its definition."""

import warnings

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from utils.transforms import (
    MEAN,
    MEAN_PIXEL,
    STD,
    BatchAugment,
    Draws,
    denormalize,
    normalize,
    test_transform,
    train_transform,
)

BORDER = {"reflect": cv2.BORDER_REFLECT_101, "constant": cv2.BORDER_CONSTANT}


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def draws_of(crops, flips, holes):
    """Draws from lists of (crop_y, crop_x), flip, (hole_y, hole_x)."""
    crops, holes = torch.tensor(crops), torch.tensor(holes)
    return Draws(crops[:, 0], crops[:, 1], torch.tensor(flips, dtype=torch.bool), holes[:, 0], holes[:, 1])


# --- equal pixels for equal draws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
def test_every_crop_and_flip_gives_albumentations_pixels(pad_mode):
    image = random_images(1)[0]
    cases = [(y, x, flip) for y in range(9) for x in range(9) for flip in (False, True)]
    ours = BatchAugment(pad_mode=pad_mode, cutout=0).apply(
        torch.from_numpy(image[None]),
        torch.zeros(len(cases), dtype=torch.int64),
        draws_of([(y, x) for y, x, _ in cases], [flip for *_, flip in cases], [(0, 0)] * len(cases)),
    )
    pad = A.PadIfNeeded(min_height=40, min_width=40, border_mode=BORDER[pad_mode], fill=MEAN_PIXEL)
    for (y, x, flip), result in zip(cases, ours):
        crop = A.Crop(x_min=x, y_min=y, x_max=x + 32, y_max=y + 32)
        expected = A.Compose([pad, crop, A.HorizontalFlip(p=float(flip))])(image=image)["image"]
        np.testing.assert_array_equal(result.numpy(), expected, err_msg=f"crop ({y}, {x}), flip {flip}")


@given(
    seed=st.integers(0, 2**32 - 1),
    pad=st.integers(0, 15),
    pad_mode=st.sampled_from(["reflect", "constant"]),
    flip=st.booleans(),
    cutout=st.integers(0, 32),
)
@settings(max_examples=60)
def test_for_equal_draws_both_pipelines_give_equal_pixels(seed, pad, pad_mode, flip, cutout):
    settings = dict(pad=pad, pad_mode=pad_mode, flip=flip, cutout=cutout)
    images = random_images(4, seed)
    pipeline = A.Compose(train_transform(**settings).transforms, seed=seed, save_applied_params=True)
    expected, crops, flips, holes = [], [], [], []
    for image in images:
        result = pipeline(image=image)
        applied = dict(result["applied_transforms"])
        expected.append(result["image"])
        x, y = applied["RandomCrop"]["crop_coords"][:2]
        crops.append((y, x))
        flips.append("HorizontalFlip" in applied)
        x, y = applied["CoarseDropout"]["holes"][0][:2] if cutout else (0, 0)
        holes.append((int(y), int(x)))

    pixels = BatchAugment(**settings).apply(torch.from_numpy(images), torch.arange(4), draws_of(crops, flips, holes))
    expected = torch.stack(expected)
    np.testing.assert_array_equal(pixels.numpy(), denormalize(expected))
    torch.testing.assert_close(normalize(pixels), expected, rtol=0, atol=1e-6)


def test_a_batch_holds_the_images_of_its_index():
    images = torch.from_numpy(random_images(5))
    before = images.clone()
    still = draws_of([(4, 4)] * 3, [False] * 3, [(0, 0)] * 3)  # the middle crop changes nothing
    result = BatchAugment(cutout=0).apply(images, torch.tensor([3, 0, 3]), still)
    assert result.dtype == torch.uint8
    assert torch.equal(result, images[[3, 0, 3]])
    result.zero_()
    assert torch.equal(images, before)


# --- equal distributions for free draws -----------------------------------------------------------------------------

COUNT = 6000
LEVEL = 1e-4  # seeds are fixed, so the tests always give the same result


def coordinate_image():
    """Channel 0 holds each pixel's row, channel 1 its column, channel 2 a value that the fill colour does not have."""
    rows, columns = np.mgrid[:32, :32]
    return np.stack([rows, columns, np.full((32, 32), 255)], axis=2).astype(np.uint8)


def recover_draws(images):
    """The draws behind augmented coordinate images, read off their pixels.

    Returns:
        (N, 5) int: crop_y, crop_x, flip, hole_y, hole_x.
    """
    recovered = []
    for image in images.astype(int):
        in_hole = image[..., 2] != 255
        assert in_hole.sum() == 64
        hole_y, hole_x = np.argwhere(in_hole)[0]
        assert in_hole[hole_y : hole_y + 8, hole_x : hole_x + 8].all()
        # Two neighbouring pixels outside the hole and the reflected border.
        row = 4 if hole_y > 4 else 27
        rows, columns = image[row, 15:17, 0], image[row, 15:17, 1]
        flip = int(columns[0] > columns[1])
        source_column = 31 - 15 if flip else 15
        recovered.append((rows[0] - row + 4, columns[0] - source_column + 4, flip, hole_y, hole_x))
    return np.array(recovered)


@pytest.fixture(scope="module")
def free_draws():
    """``COUNT`` free draws of each pipeline, both recovered from pixels."""
    image = coordinate_image()
    pipeline = train_transform(seed=1)
    reference = denormalize(torch.stack([pipeline(image=image)["image"] for _ in range(COUNT)]))
    augment = BatchAugment()
    draws = augment.draw(COUNT, torch.Generator().manual_seed(1))
    batched = augment.apply(torch.from_numpy(image[None]), torch.zeros(COUNT, dtype=torch.int64), draws)
    return {"albumentations": recover_draws(reference), "batched": recover_draws(batched.numpy())}


# Columns of the draws, and the number of values of each. Pairs show that two choices are independent.
CHOICES = {
    "crop y": ([0], (9,)),
    "crop x": ([1], (9,)),
    "flip": ([2], (2,)),
    "hole y": ([3], (25,)),
    "hole x": ([4], (25,)),
    "crop y and x": ([0, 1], (9, 9)),
    "crop x and flip": ([1, 2], (9, 2)),
    "hole y and x": ([3, 4], (25, 25)),
    "crop y and hole y": ([0, 3], (9, 25)),
    "flip and hole x": ([2, 4], (2, 25)),
}


def counts_of(draws, columns, sizes):
    return np.bincount(np.ravel_multi_index(draws[:, columns].T, sizes), minlength=np.prod(sizes))


@pytest.mark.parametrize("choice", CHOICES)
def test_free_draws_of_both_pipelines_share_one_distribution(free_draws, choice):
    columns, sizes = CHOICES[choice]
    counts = {name: counts_of(draws, columns, sizes) for name, draws in free_draws.items()}
    assert chi2_contingency([counts["albumentations"], counts["batched"]]).pvalue > LEVEL
    for name, count in counts.items():
        assert chisquare(count).pvalue > LEVEL, name  # and it is the uniform one


@pytest.mark.parametrize("name", ["albumentations", "batched"])
def test_padding_is_four_pixels_on_each_side_and_the_hole_reaches_every_edge(free_draws, name):
    crop_y, crop_x, _, hole_y, hole_x = (set(values) for values in free_draws[name].T)
    assert crop_y == crop_x == set(range(9))  # the crop moves by up to 4 pixels either way
    assert hole_y == hole_x == set(range(25))


def test_one_seed_gives_one_sequence_of_draws():
    def draw(seed):
        draws = BatchAugment().draw(100, torch.Generator().manual_seed(seed))
        return torch.stack([draws.crop_y, draws.crop_x, draws.flips, draws.hole_y, draws.hole_x])

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_turned_off_nothing_is_random():
    images = torch.from_numpy(random_images(6))
    augment = BatchAugment(pad=0, flip=False, cutout=0)
    draws = augment.draw(6, torch.Generator().manual_seed(0))
    assert torch.equal(augment.apply(images, torch.arange(6), draws), images)
    transform = train_transform(pad=0, flip=False, cutout=0, seed=0)
    for image in images.numpy():
        np.testing.assert_array_equal(denormalize(transform(image=image)["image"]), image)


# --- the reference pipelines ----------------------------------------------------------------------------------------


def test_the_test_pipeline_is_deterministic_and_only_normalizes():
    image = random_images(1)[0]
    first, second = (test_transform()(image=image)["image"] for _ in range(2))
    assert torch.equal(first, second)
    np.testing.assert_array_equal(denormalize(first), image)


def test_the_reference_train_pipeline_repeats_with_its_seed_only():
    def run(seed):
        transform = train_transform(seed=seed)
        return torch.stack([transform(image=coordinate_image())["image"] for _ in range(8)])

    assert torch.equal(run(5), run(5))
    assert not torch.equal(run(5), run(6))


def test_cutout_fills_one_square_with_the_mean_colour():
    white = np.full((32, 32, 3), 255, np.uint8)
    result = denormalize(train_transform(seed=0)(image=white)["image"])
    hole = (result != 255).any(axis=2)
    assert hole.sum() == 64
    assert (result[hole] == MEAN_PIXEL).all()
    np.testing.assert_allclose(MEAN_PIXEL, 255 * np.array(MEAN), atol=0.5)


def test_the_pipelines_return_normalized_chw_floats_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for transform in (train_transform(seed=0), train_transform(pad_mode="constant", seed=0), test_transform()):
            result = transform(image=random_images(1)[0])["image"]
            assert result.shape == (3, 32, 32)
            assert result.dtype == torch.float32


def test_an_old_albumentations_argument_is_an_error_here():
    # The library itself only warns, and uses holes of another size.
    with pytest.raises(UserWarning, match="not valid for transform"):
        A.CoarseDropout(max_holes=1, max_height=8, max_width=8, p=1.0)


# --- normalization --------------------------------------------------------------------------------------------------


def every_pixel_value():
    """(1, 16, 16, 3) uint8: all 256 values in each of the three channels."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    return np.concatenate([values, values[:, ::-1], values[:, :, ::-1]], axis=3)


def test_denormalize_gives_back_every_pixel_value_exactly():
    pixels = every_pixel_value()
    for normalized in (normalize(torch.from_numpy(pixels)), test_transform()(image=pixels[0])["image"][None]):
        unrounded = (normalized * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
        assert (unrounded - unrounded.round()).abs().max() < 0.01  # far from the next value
        np.testing.assert_array_equal(denormalize(normalized), pixels)
        np.testing.assert_array_equal(denormalize(normalized[0]), pixels[0])
        assert denormalize(normalized).dtype == np.uint8


def test_normalize_is_albumentations_normalize():
    pixels = every_pixel_value()
    expected = A.Normalize(mean=MEAN, std=STD, max_pixel_value=255.0)(image=pixels[0])["image"]
    result = normalize(torch.from_numpy(pixels))
    np.testing.assert_allclose(result[0].permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-6)
    by_definition = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(result.permute(0, 2, 3, 1).numpy(), by_definition, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalize_gives_channels_last_in_the_requested_dtype(dtype):
    result = normalize(torch.from_numpy(random_images(4)), dtype)
    assert result.shape == (4, 3, 32, 32)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_mean_and_std_are_those_of_the_real_train_set(cifar10):
    pixels = cifar10.train_images.reshape(-1, 3)
    values = np.arange(256) / 255
    shares = np.stack([np.bincount(channel, minlength=256) / len(pixels) for channel in pixels.T])  # (3, 256)
    mean, square = shares @ values, shares @ values**2
    np.testing.assert_array_equal(mean.round(4), MEAN)
    np.testing.assert_array_equal(np.sqrt(square - mean**2).round(4), STD)
