"""Finding and describing the data; fingerprints, subsets and held-out sets."""

import dataclasses
import hashlib
import shutil

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from utils import dataset as dataset_module
from utils.dataset import DatasetError, ImageDataset, balanced_indices, load_dataset

# --- finding and naming the data ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("project_root")
@pytest.mark.parametrize(
    ("name", "holds", "words"),
    [
        ("nowhere", None, r"no folder .*nowhere: check the path given as root, --data-dir or \$CIFAR10_DIR"),
        ("~no-such-user/images", None, "no folder ~no-such-user/images: check the path"),
        ("x" * 5000, None, "cannot be read .File name too long"),
        (
            "empty",
            [],
            "empty holds nothing: expected torchvision's cifar-10-batches-py/, or image folders train/<class>",
        ),
        ("holiday", ["beach.mp4"], "holiday holds beach.mp4: expected"),
        ("caf\udce9", ["\udce9t\udce9"], r"caf\\xe9 holds \\xe9t\\xe9: expected"),
    ],
)
def test_the_error_for_a_folder_without_data_says_what_it_should_hold(tmp_path, monkeypatch, name, holds, words):
    folder = name if name.startswith("~") else tmp_path / name
    if holds is not None:
        folder.mkdir()
        for file in holds:
            (folder / file).touch()
    with pytest.raises(DatasetError, match=words) as error:
        load_dataset(folder)
    str(error.value).encode()  # it can be printed
    monkeypatch.setenv("CIFAR10_DIR", str(folder))
    with pytest.raises(DatasetError, match=words):
        load_dataset()


@pytest.mark.usefixtures("project_root")
def test_only_the_named_source_is_accepted(image_folder):
    with pytest.raises(DatasetError, match="expected torchvision's"):
        load_dataset(image_folder, source="official")
    with pytest.raises(DatasetError, match=r"no folder is named: pass root=... or set \$CIFAR10_DIR"):
        load_dataset(source="image-folder")
    with pytest.raises(ValueError, match="source is 'mnist': choose 'auto', 'official', 'image-folder' or 'digits'"):
        load_dataset(image_folder, source="mnist")


@pytest.mark.usefixtures("project_root")
def test_the_environment_names_a_folder_and_an_argument_overrides_it(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_DIR", str(image_folder))
    shutil.copytree(image_folder, tmp_path / "own")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "own" / split / "cat")
    assert len(load_dataset().train_labels) == 60
    assert len(load_dataset(tmp_path / "own").train_labels) == 54


@pytest.mark.usefixtures("project_root")
def test_the_description_says_what_the_images_are(image_folder, monkeypatch):
    dataset = load_dataset(image_folder)
    assert dataset.description == "CIFAR-10 as an image folder, 60 train and 30 test images"
    assert not dataset.is_stand_in
    monkeypatch.setattr(dataset_module, "KNOWN_FINGERPRINTS", {dataset.fingerprint: "a copy that is known"})
    assert load_dataset(image_folder).description == "a copy that is known"
    assert dataset.holdout(10).description == f"{dataset.description}; 10 train images held out for validation"
    for split in ("train", "test"):
        shutil.rmtree(image_folder / split / "cat")
    assert load_dataset(image_folder).description == "own images in 9 classes, 54 train and 27 test images"
    stand_in = load_dataset(source="digits")
    assert stand_in.is_stand_in
    assert "NOT CIFAR-10" in stand_in.description


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_one_pixel_one_label_or_one_name(toy):
    def changed(**values):
        return dataclasses.replace(toy, **values).fingerprint

    pixels, labels = toy.test_images.copy(), toy.train_labels.copy()
    pixels[7, 3, 5, 1] ^= 1
    labels[11] = (labels[11] + 1) % 10
    expected = toy.fingerprint
    assert changed() == expected
    assert len({expected, changed(test_images=pixels), changed(train_labels=labels)}) == 3
    assert changed(classes=("ship", *toy.classes[1:])) != expected
    assert changed(description="another one", source="official") == expected  # the data alone


def test_a_fingerprint_is_computed_once(image_folder, project_root, monkeypatch):
    load_dataset(image_folder)  # writes the cache of decoded images
    hashed, sha256 = [], hashlib.sha256

    def counting(*args):
        hashed.append(args)
        return sha256(*args)

    monkeypatch.setattr(dataset_module.hashlib, "sha256", counting)
    dataset = load_dataset(image_folder)
    before = len(hashed)
    assert dataset.fingerprint == dataset.fingerprint
    assert len(hashed) == before
    assert dataset.holdout(10).fingerprint != dataset.fingerprint
    assert len(hashed) == before + 1


# --- subsets --------------------------------------------------------------------------------------------------------


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=200),
    count=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
@example(labels=[0] * 10 + [1] * 10 + [2] * 10 + [3], count=21, seed=0)  # two rounds with a rest
def test_balanced_indices_are_distinct_sorted_and_balanced(labels, count, seed):
    labels = np.array(labels)
    assume(count <= len(labels))
    chosen = balanced_indices(labels, count, seed)
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    names, sizes = np.unique(labels, return_counts=True)
    shares = np.array([(labels[chosen] == name).sum() for name in names])
    unfinished = shares[shares < sizes]  # only a class that gave all its images may have fewer
    assert shares.max() - unfinished.min(initial=shares.max()) <= 1
    np.testing.assert_array_equal(chosen, balanced_indices(labels, count, seed))


def test_the_error_for_too_large_a_subset_names_the_limit():
    with pytest.raises(DatasetError, match="a subset of 56 images of 55: ask for at most 55"):
        balanced_indices(np.array([0] * 5 + [1] * 50), 56, seed=0)


def test_unbalanced_own_images_can_be_subset():
    labels = np.array([0] * 5 + [1] * 50 + [2] * 50)
    assert np.bincount(labels[balanced_indices(labels, 30, seed=0)]).tolist() == [5, 13, 12]


def numbered_dataset(count, classes=4):
    """Images whose pixels hold their index."""
    index = np.arange(count)
    images = np.zeros((count, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = index % 256, index // 256
    names = tuple(f"class {number}" for number in range(classes))
    return ImageDataset(images, index % classes, images[:classes], index[:classes], names, "image-folder", "numbered")


def numbers_of(images):
    return images[:, 0, 0, 0].astype(int) + 256 * images[:, 0, 0, 1].astype(int)


def assert_balanced(images, labels, count):
    """``count`` different images of a numbered dataset, with their labels, balanced; returns their numbers."""
    numbers = numbers_of(images)
    assert len(labels) == count == len(set(numbers))
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(labels, numbers % 4)
    shares = np.bincount(labels, minlength=4)
    assert shares.max() - shares.min() <= 1
    return numbers


@given(count=st.integers(40, 400), held=st.integers(4, 36), seed=st.integers(0, 100))
@settings(max_examples=40)
def test_a_holdout_moves_balanced_train_images_to_test(count, held, seed):
    split = numbered_dataset(count).holdout(held, seed)
    numbers = [assert_balanced(split.test_images, split.test_labels, held), numbers_of(split.train_images)]
    np.testing.assert_array_equal(split.train_labels, numbers[1] % 4)
    assert sorted(np.concatenate(numbers)) == list(range(count))
    assert f"{held:,} train images held out" in split.description


@given(train=st.integers(4, 100), test=st.integers(4, 30), seed=st.integers(0, 100))
@settings(max_examples=40)
def test_a_subset_is_balanced_and_keeps_images_with_their_labels(train, test, seed):
    whole = numbered_dataset(120)
    dataset = dataclasses.replace(whole, test_images=whole.train_images[:40], test_labels=whole.train_labels[:40])
    small = dataset.subset(train, test, seed)
    assert_balanced(small.train_images, small.train_labels, train)
    assert_balanced(small.test_images, small.test_labels, test)


def test_a_subset_at_least_as_large_as_the_set_is_the_set(toy):
    for same in (toy.subset(), toy.subset(60, 30), toy.subset(10_000, 10_000)):
        assert same.train_images is toy.train_images
        assert same.test_images is toy.test_images
