"""Images become 8-bit RGB the same way whatever file they come from."""

import io

import numpy as np
import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.tasks import create_task
from mixerzoo.tasks.images.decode import image_suffixes, read_image, to_rgb
from PIL import Image

RANDOM = np.random.RandomState(0)
GREY = RANDOM.randint(0, 256, (5, 7)).astype(np.uint8)
GREY[0, :2] = 0, 255
COLOUR = RANDOM.randint(0, 256, (6, 4, 3)).astype(np.uint8)


def through(image, form, **options):
    """Write an image and read it."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    buffer.seek(0)
    return np.asarray(read_image(buffer))


def as_rgb(grey):
    return np.repeat(np.asarray(grey, np.uint8)[..., None], 3, 2)


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (GREY.astype(np.uint16) * 257, "PNG"),  # I;16
        (GREY.astype(np.uint16) * 257, "TIFF"),
        (GREY.astype(np.uint16) * 257, "JPEG2000"),
        (GREY.astype(np.int32) * 257, "PPM"),
        (GREY.astype(np.int32) * 257, "TIFF"),  # 32 bits
        (GREY.astype(np.int32), "TIFF"),
        (GREY.astype(np.float32) / 255, "TIFF"),  # F
        (GREY.astype(np.float32), "TIFF"),
        (GREY.astype(np.float32) * 257, "TIFF"),
    ],
)
def test_more_than_8_bits_are_scaled(values, form):
    assert np.array_equal(through(Image.fromarray(values), form), as_rgb(GREY))


def test_mode_i_of_a_png_is_16_bits():
    """As older versions of Pillow open them."""
    image = Image.fromarray(GREY.astype(np.int32))
    image.format = "PNG"
    assert np.array_equal(np.asarray(to_rgb(image)), as_rgb(np.rint(GREY / 257)))


def test_16_bits_are_rounded_not_stretched():
    """A dark picture stays dark: the scale is the format's, not the picture's."""
    values = np.array([[0, 128, 129, 1000, 257 * 3]], np.uint16)
    assert through(Image.fromarray(values), "PNG")[0, :, 0].tolist() == [0, 0, 1, 4, 3]


def test_big_endian_tiff():
    image = Image.frombytes("I;16B", (7, 5), (GREY.astype(">u2") * 257).tobytes())
    assert np.array_equal(through(image, "TIFF"), as_rgb(GREY))


@pytest.mark.parametrize(
    "values",
    [np.full((2, 2), -1.0, np.float32), np.full((2, 2), 7e4, np.float32), np.array([[0, np.nan]], np.float32),
     np.array([[0, np.inf]], np.float32), np.full((2, 2), -5, np.int32), np.full((2, 2), 2**20, np.int32)],
)  # fmt: skip
def test_values_of_no_known_range_are_refused(values):
    with pytest.raises(ValueError, match="known ranges"):
        through(Image.fromarray(values), "TIFF")


ORIENTED = {  # what turns the stored picture into the one that is meant
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.rot90(np.fliplr(x)),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(np.flipud(x)),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    found = through(Image.fromarray(COLOUR), form, exif=exif, **options)
    plain = through(Image.fromarray(COLOUR), form, **options)
    assert np.array_equal(found, ORIENTED[orientation](plain))
    if form != "JPEG":
        assert np.array_equal(plain, COLOUR)


def test_orientation_of_16_bits():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = through(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG", exif=exif)
    assert np.array_equal(found, as_rgb(np.rot90(GREY, -1)))


def test_damaged_exif_says_nothing():
    buffer = io.BytesIO()
    Image.fromarray(COLOUR).save(buffer, "PNG", exif=b"Exif\0\0not a header at all")
    buffer.seek(0)
    assert np.array_equal(np.asarray(read_image(buffer)), COLOUR)


def test_alpha_is_dropped_and_palettes_are_looked_up(recwarn):
    alpha = np.concatenate([COLOUR, RANDOM.randint(0, 256, (6, 4, 1)).astype(np.uint8)], 2)
    assert np.array_equal(through(Image.fromarray(alpha), "PNG"), COLOUR)
    assert np.array_equal(through(Image.fromarray(np.stack([GREY, GREY], 2)), "PNG"), as_rgb(GREY))  # LA
    palette = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4), "P")
    colours = RANDOM.randint(0, 256, (12, 3))
    palette.putpalette(colours.ravel().tolist())
    for options in ({}, {"transparency": 3}, {"transparency": bytes(range(12))}):
        assert np.array_equal(through(palette, "PNG", **options), colours.reshape(3, 4, 3))
    assert np.array_equal(through(Image.fromarray(GREY > 127), "PNG"), as_rgb((GREY > 127) * 255))
    assert not list(recwarn)


def test_the_first_frame_is_taken():
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
    assert (
        through(frames[0], "GIF", save_all=True, append_images=frames[1:]).reshape(-1, 3).tolist() == [[255, 0, 0]] * 6
    )


def test_suffixes_are_what_pillow_reads():
    found = image_suffixes()
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".avif", ".jp2"} <= found
    assert not {".txt", ".mpg", ".h5", ".eps", ".pdf", ""} & found


def write_folder(root):
    """The same picture in many guises, as the classes of a set."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.rot90(GREY)
    guises = {
        "plain": (GREY, "a.png", {}),
        "sixteen": (GREY.astype(np.uint16) * 257, "a.png", {}),
        "wide": (GREY.astype(np.int32) * 257, "a.tif", {}),
        "floating": (GREY.astype(np.float32) / 255, "a.tiff", {}),
        "turned": (turned, "a.png", {"exif": exif}),
        "alpha": (np.stack([GREY, 255 - GREY], 2), "a.png", {}),
    }
    for split in ("train", "val"):
        for name, (values, file, options) in guises.items():
            (root / split / name).mkdir(parents=True)
            Image.fromarray(np.ascontiguousarray(values)).save(root / split / name / file, **options)
    return list(guises)


def test_the_task_sees_the_same_picture(tmp_path):
    names = write_folder(tmp_path)
    task = create_task("imagefolder", root=str(tmp_path), image_size=16)
    task.open()
    batch = task.fetch("val", torch.arange(len(names)), train=False, generator=torch.Generator())
    for label, image in zip(batch["target"].tolist(), batch["input"], strict=True):
        assert torch.equal(image, batch["input"][0]), task.classes[label]
    notes = "\n".join(task.notes())
    for said in ("6 of 12 images scaled from more than 8 bits to 8", "2 of 12 images turned as their EXIF orientation",
                 "2 of 12 images with transparency, which is dropped"):  # fmt: skip
        assert said in notes


def test_a_range_that_is_not_known_names_the_file(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(np.full((4, 4), 1e6, np.float32)).save(tmp_path / "train" / "floating" / "b.tiff")
    with pytest.raises(ConfigError, match=r"floating/b\.tiff.*known ranges"):
        create_task("imagefolder", root=str(tmp_path), image_size=16).open()
