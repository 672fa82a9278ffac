"""One picture and folders of pictures: right pixels under the right labels, or a clear message."""

import io
import os
import shutil
import struct
import unicodedata
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from tests.pictures import BLUE, GREEN, RED, WHITE, cat_and_dog, colours, draw
from utils.dataset import load_dataset
from utils.sources import CIFAR10_CLASSES, DatasetError
from utils.sources.pictures import read_image

pytestmark = pytest.mark.usefixtures("project_root")


# --- one picture ------------------------------------------------------------------------------------------------------

UPRIGHT = np.zeros((32, 32, 3), np.uint8)
UPRIGHT[:16, :16], UPRIGHT[:16, 16:], UPRIGHT[16:, :16] = RED, BLUE, WHITE


@pytest.mark.parametrize(("orientation", "suffix"), [*((n, "png") for n in range(1, 9)), (6, "tiff"), (6, "webp")])
def test_exif_orientation_is_applied_as_pillow_does(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(UPRIGHT).save(tmp_path / f"phone.{suffix}", exif=exif, lossless=True)
    with Image.open(tmp_path / f"phone.{suffix}") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_image(tmp_path / f"phone.{suffix}"), expected)


def long_text(path):
    info = PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    Image.fromarray(UPRIGHT).save(path, "PNG", pnginfo=info)


def turned_jpeg(path, layout, good, faulty):
    """Taken with the camera turned by 90 degrees; in its EXIF, ``faulty`` stands in the place of ``good``."""
    exif = Image.Exif()
    exif[274], exif[282] = 6, 72.0  # orientation, resolution
    spoilt = exif.tobytes().replace(struct.pack(layout, *good), struct.pack(layout, *faulty))
    Image.fromarray(np.rot90(UPRIGHT).copy()).save(path, "JPEG", exif=spoilt, quality=100, subsampling=0)


FAULTY_METADATA = {
    "long text": long_text,
    "long colour profile": lambda path: Image.fromarray(UPRIGHT).save(path, "PNG", icc_profile=bytes(2_000_000)),
    "division by zero": lambda path: turned_jpeg(path, ">II", (72, 1), (72, 0)),
    "wrong type": lambda path: turned_jpeg(path, ">HH", (282, 5), (282, 2)),
    "length beyond the file": lambda path: turned_jpeg(path, ">HHI", (282, 5, 1), (282, 5, 1000)),
}


@pytest.mark.parametrize("case", FAULTY_METADATA)
def test_faulty_metadata_are_no_damage(tmp_path, case):
    FAULTY_METADATA[case](tmp_path / "picture")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's warnings do not reach the user
        np.testing.assert_allclose(read_image(tmp_path / "picture"), UPRIGHT, atol=2)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_of_16_bits_keeps_its_shades(tmp_path, suffix):
    ramp = np.arange(1024).reshape(32, 32) / 1023
    Image.fromarray((ramp * 65_535).round().astype(np.uint16)).save(tmp_path / f"scan.{suffix}")
    image = read_image(tmp_path / f"scan.{suffix}")
    np.testing.assert_allclose(image, (ramp * 255)[..., None].repeat(3, axis=2), atol=1)


def plain(mode, colour):
    return Image.new("RGB", (32, 32), colour).convert(mode)


def palette_with_a_hole():
    picture = Image.new("P", (32, 32), 0)
    picture.putpalette([0, 0, 0, *RED])
    picture.paste(1, (16, 0, 32, 32))
    picture.info["transparency"] = 0  # black, and invisible
    return picture


BLUE_FOLLOWS = dict(save_all=True, append_images=[plain("RGB", BLUE)])
SHOWN = {  # file: the picture as saved, how, and the colours of its left and right half as read
    "half transparent.png": (Image.new("RGBA", (32, 32), (*RED, 128)), {}, (255, 127, 127), (255, 127, 127)),
    "palette with a hole.gif": (palette_with_a_hole(), {}, WHITE, RED),
    "black and white.png": (plain("1", WHITE), {}, WHITE, WHITE),
    "palette.png": (plain("P", RED), {}, RED, RED),
    "cmyk.jpg": (plain("CMYK", RED), {}, RED, RED),
    "animated.gif": (plain("RGB", RED), BLUE_FOLLOWS, RED, RED),
    "pages.tiff": (plain("RGB", RED), BLUE_FOLLOWS, RED, RED),
}


@pytest.mark.parametrize("name", SHOWN)
def test_transparency_colour_modes_and_several_frames(tmp_path, name):
    picture, how, left, right = SHOWN[name]
    picture.save(tmp_path / name, **how)
    expected = np.array([left] * 16 + [right] * 16)[None].repeat(32, axis=0)
    np.testing.assert_allclose(read_image(tmp_path / name), expected, rtol=0, atol=2 if name.endswith(".jpg") else 0)


def test_the_crop_is_the_central_square(tmp_path):
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, :64], wide[:, 64:128], wide[:, 128:] = 10, 100, 200
    for picture in (wide, wide.transpose(1, 0, 2)):
        Image.fromarray(picture).save(tmp_path / "image.png")
        np.testing.assert_allclose(read_image(tmp_path / "image.png"), 100, atol=6)  # Lanczos overshoots at edges


def saved_as(format):
    buffer = io.BytesIO()
    Image.fromarray(UPRIGHT).save(buffer, format)
    return buffer.getvalue()


UNREADABLE = {  # file: its content, and the message
    "cut short.png": (saved_as("PNG")[:-50], "truncated"),
    "web page.jpg": (b"<html>404</html>", "not a picture"),
    "PostScript.png": (saved_as("EPS"), "not a picture"),  # would start Ghostscript
    "IMG_1.heic": (b"\0\0\0\x18ftypmp42", "not a picture .*HEIC: export as JPEG, or .pip install pillow-heif"),
    "missing.png": (None, "No such file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_picture_that_cannot_be_read_is_named_with_the_reason(tmp_path, name):
    content, words = UNREADABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=f"{name}: .*{words}"):
        read_image(tmp_path / name)


# --- folders of pictures ----------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    return cat_and_dog(tmp_path / "own")


def test_a_folder_gives_the_exact_pixels_in_the_official_order(image_folder, toy):
    def check(dataset):
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            np.testing.assert_array_equal(getattr(dataset, name), getattr(toy, name))
        assert dataset.classes == CIFAR10_CLASSES

    check(load_dataset(image_folder))
    for split in ("train", "test"):  # CIFAR-10's long names mean the same classes
        (image_folder / split / "plane").rename(image_folder / split / "airplane")
        (image_folder / split / "car").rename(image_folder / split / "automobile")
    check(load_dataset(image_folder))


def test_own_classes_keep_their_names(tmp_path):
    names = ("airplane", "automobile", "helicopter")
    for split in ("train", "test"):
        for name, colour in zip(names, (RED, GREEN, BLUE)):
            draw(tmp_path / split / name, colour)
    assert load_dataset(tmp_path).classes == names


def test_all_that_is_in_a_class_folder_is_used_or_counted_in_one_warning(own):
    draw(own / "train/cat", RED, 4, ".jpeg")
    for path, name in zip((own / "train/cat").glob("*.jpeg"), ("unnamed", "x.jpe", "y.jpg_large", "z.PDF")):
        path.rename(path.with_name(name))
    for number in range(3):
        (own / f"train/dog/IMG_{number}.HEIC").write_bytes(b"\0\0\0\x18ftypmp42")
    (own / "train/dog/notes.txt").write_text("bought at the market")
    draw(own / "train", GREEN, 1)  # of no class
    with pytest.warns(UserWarning, match="are not used") as said:
        dataset = load_dataset(own)
    assert np.bincount(dataset.train_labels).tolist() == [7, 3]
    (message,) = [str(warning.message) for warning in said]
    for words in ("5 of 17 files", "3 .heic, ", "1 .txt", "1 .png", "such as ", "HEIC: export as JPEG"):
        assert words in message


def test_pictures_in_sub_folders_belong_to_the_class_and_what_systems_leave_to_none(own):
    draw(own / "train/cat/2023/May", GREEN, 2)
    shutil.copytree(own / "train/cat", own / "train/.thumbnails")
    shutil.copytree(own / "train/cat", own / "train/__MACOSX/cat")
    shutil.copytree(own / "train/cat", own / "train/dog/@eaDir")  # a NAS's thumbnails
    for name in ("Thumbs.db", "desktop.ini", "._00000.png", ".DS_Store"):
        (own / "train/dog" / name).write_bytes(b"\0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load_dataset(own)
    found = colours(dataset.train_images, dataset.train_labels, dataset.classes)
    assert found == {"cat": {RED, GREEN}, "dog": {BLUE}}
    assert np.bincount(dataset.train_labels).tolist() == [5, 3]


def test_swapped_folders_change_the_labels_though_sizes_and_times_stay(own):
    def found():
        dataset = load_dataset(own)
        return colours(dataset.train_images, dataset.train_labels, dataset.classes)

    assert found() == {"cat": {RED}, "dog": {BLUE}}
    for path in own.rglob("*.png"):
        os.utime(path, (0, 0))
    (own / "train/cat").rename(own / "train/other")
    (own / "train/dog").rename(own / "train/cat")
    (own / "train/other").rename(own / "train/dog")
    assert found() == {"cat": {BLUE}, "dog": {RED}}


def test_a_name_is_the_same_in_every_unicode_form(own, tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Kätzchen") for form in ("NFC", "NFD"))
    (own / "train/cat").rename(own / "train" / composed)
    (own / "test/cat").rename(own / "test" / decomposed)
    draw(own / "train" / decomposed, GREEN)
    dataset = load_dataset(own)
    assert dataset.classes == (composed, "dog")
    assert colours(dataset.train_images, dataset.train_labels, dataset.classes)[composed] == {RED, GREEN}


def test_names_that_are_not_utf8_are_printable(own):
    for split in ("train", "test"):
        (own / split / "cat").rename(own / split / os.fsdecode(b"Stra\xdfe"))
    assert load_dataset(own).classes == (r"Stra\xdfe", "dog")
    (own / "train" / os.fsdecode(b"Stra\xdfe/caf\xe9.png")).write_bytes(b"")
    with pytest.raises(DatasetError, match=r"Stra\\xdfe/caf\\xe9.png: not a picture"):
        load_dataset(own)


def test_all_damaged_pictures_are_found_at_once(own):
    draw(own / "train/cat", RED, 7)
    for path in sorted((own / "train/cat").iterdir())[:8]:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DatasetError, match="damaged pictures: 8; replace or remove them") as error:
        load_dataset(own)
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    assert "train/cat/00000.png: " in lines[1]


@pytest.mark.parametrize("doubled", ["train", "own"])
def test_a_doubled_folder_is_entered(own, doubled):
    folder = own if doubled == "own" else own / doubled
    folder.rename(own.parent / "moved")
    folder.mkdir()
    (own.parent / "moved").rename(folder / folder.name)
    assert load_dataset(own).classes == ("cat", "dog")


UNUSABLE = {  # what makes a good folder unusable, and the message
    "empty class": (
        lambda own: (own / "train/kitten").mkdir(),
        "train has pictures of cat, dog, but not of kitten: add",
    ),
    "unknown class": (lambda own: draw(own / "test/kitten", RED), "of cat, dog, but not of kitten: add"),
    "one class": (lambda own: [shutil.rmtree(path) for path in own.glob("*/dog")], "of cat, .* two or more are needed"),
    "empty test": (lambda own: [shutil.rmtree(path) for path in own.glob("test/*")], "test of 0 classes: two or more"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_folder_is_named_with_the_reason(own, case):
    spoil, words = UNUSABLE[case]
    spoil(own)
    with pytest.raises(DatasetError, match=words):
        load_dataset(own)


def test_a_class_without_test_pictures_gives_a_warning(own):
    shutil.rmtree(own / "test/cat")
    with pytest.warns(UserWarning, match="test has no pictures of cat: add some to test them"):
        assert load_dataset(own).classes == ("cat", "dog")
