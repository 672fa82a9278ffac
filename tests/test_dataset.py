"""Finding and describing the data; fingerprints, subsets and held-out sets."""

import dataclasses

import numpy as np
import pytest

from tests.pictures import cat_and_dog
from utils import dataset as dataset_module
from utils.dataset import ImageDataset, balanced_indices, load_dataset
from utils.sources import DatasetError


@pytest.mark.usefixtures("project_root")
@pytest.mark.parametrize(
    ("name", "holds", "words"),
    [
        ("nowhere", None, r"no folder .*nowhere: check the path given as root, --data-dir or \$CIFAR10_DIR"),
        ("~no-such-user/images", None, "no folder ~no-such-user/images: check the path"),
        ("empty", [], r"empty holds nothing: expected torchvision's cifar-10-batches-py/, .* train/<class>/\*.png"),
        ("caf\udce9", ["\udce9t\udce9.mp4"], r"caf\\xe9 holds \\xe9t\\xe9.mp4: expected"),
    ],
)
def test_the_error_for_a_folder_without_data_says_what_it_should_hold(tmp_path, monkeypatch, name, holds, words):
    folder = name if name.startswith("~") else tmp_path / name
    if holds is not None:
        folder.mkdir()
        for file in holds:
            (folder / file).touch()
    with pytest.raises(DatasetError, match=words):
        load_dataset(folder)
    monkeypatch.setenv("CIFAR10_DIR", str(folder))
    with pytest.raises(DatasetError, match=words):
        load_dataset()


@pytest.mark.usefixtures("project_root")
def test_only_the_named_source_is_accepted(image_folder):
    with pytest.raises(DatasetError, match="expected torchvision's"):
        load_dataset(image_folder, source="official")
    with pytest.raises(DatasetError, match="no folder"):
        load_dataset(source="image-folder")
    with pytest.raises(ValueError, match="source is 'mnist': choose one of auto, official, image-folder, digits"):
        load_dataset(image_folder, source="mnist")


@pytest.mark.usefixtures("project_root")
def test_the_environment_names_a_folder_and_an_argument_overrides_it(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_DIR", str(image_folder))
    assert len(load_dataset().train_labels) == 60
    assert len(load_dataset(cat_and_dog(tmp_path / "own")).train_labels) == 6


@pytest.mark.usefixtures("project_root")
def test_the_description_says_what_the_images_are(image_folder, tmp_path, monkeypatch):
    dataset = load_dataset(image_folder)
    assert dataset.description == "CIFAR-10 as an image folder, 60 train and 30 test images"
    assert not dataset.is_stand_in
    monkeypatch.setattr(dataset_module, "OFFLINE_COPY", dataset.fingerprint)
    assert load_dataset(image_folder).description.startswith("CIFAR-10, offline copy (59,029 of ")
    held_out = dataset.holdout(10)
    assert held_out.description == f"{dataset.description}; 10 train images held out for validation"
    assert (dataset.split, held_out.split, held_out.subset(5).split) == ("test", "validation", "validation")
    own = load_dataset(cat_and_dog(tmp_path / "own"))
    assert own.description == "own images in 2 classes, 6 train and 2 test images"
    stand_in = load_dataset(source="digits")
    assert stand_in.is_stand_in
    assert "NOT CIFAR-10" in stand_in.description


def test_a_fingerprint_changes_with_one_pixel_one_label_or_one_name(toy):
    def changed(**values):
        return dataclasses.replace(toy, **values).fingerprint

    pixels, labels = toy.test_images.copy(), toy.train_labels.copy()
    pixels[7, 3, 5, 1] ^= 1
    labels[11] = (labels[11] + 1) % 10
    classes = ("ship", *toy.classes[1:])
    expected = toy.fingerprint
    assert changed(description="another one", source="official", split="validation") == expected  # the data alone
    others = {changed(test_images=pixels), changed(train_labels=labels), changed(classes=classes)}
    assert len({expected, *others}) == 4


@pytest.mark.parametrize(
    ("sizes", "count", "shares"),
    [
        ([50, 50, 50], 30, [10, 10, 10]),
        ([5, 50, 50], 30, [5, 13, 12]),  # one class gives all it has
        ([10, 10, 10, 3], 21, [6, 6, 6, 3]),  # two rounds with a rest
        ([2, 1, 0, 4], 7, [2, 1, 0, 4]),
        ([1, 1, 1], 2, [1, 1, 0]),
    ],
)
def test_balanced_indices_are_distinct_sorted_and_balanced(sizes, count, shares):
    labels = np.random.default_rng(0).permutation(np.repeat(range(len(sizes)), sizes))
    chosen = balanced_indices(labels, count, seed=3)
    assert (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen], minlength=len(sizes)).tolist() == shares
    np.testing.assert_array_equal(chosen, balanced_indices(labels, count, seed=3))


def numbered_dataset(count):
    """Images of four classes whose pixels hold their index."""
    index = np.arange(count)
    images = np.zeros((count, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = index % 256, index // 256
    return ImageDataset(images, index % 4, images[:40], index[:40] % 4, tuple("abcd"), "image-folder", "numbered")


def numbers_of(images, labels):
    """The indices of a numbered dataset's images, which still have their labels."""
    numbers = images[:, 0, 0, 0].astype(int) + 256 * images[:, 0, 0, 1].astype(int)
    np.testing.assert_array_equal(labels, numbers % 4)
    return numbers.tolist()


@pytest.mark.parametrize("held", [4, 37, 100])
def test_a_holdout_moves_balanced_train_images_to_test(held):
    split = numbered_dataset(400).holdout(held, seed=1)
    tested = numbers_of(split.test_images, split.test_labels)
    assert len(tested) == held
    assert np.ptp(np.bincount(split.test_labels, minlength=4)) <= 1
    assert sorted(tested + numbers_of(split.train_images, split.train_labels)) == list(range(400))


def test_a_subset_is_balanced_and_keeps_images_with_their_labels():
    small = numbered_dataset(400).subset(train=41, test=10, seed=1)
    assert len(set(numbers_of(small.train_images, small.train_labels))) == 41
    assert len(set(numbers_of(small.test_images, small.test_labels))) == 10
    assert np.ptp(np.bincount(small.train_labels)) == 1
    with pytest.raises(DatasetError, match="a subset of 42 images of 41: ask for at most 41"):
        small.holdout(42)
