"""Image files to 8-bit RGB, the same way wherever an image is read.

What is done, so that no picture changes silently:

- It is turned as its EXIF orientation says.
- Grey of more than 8 bits is scaled: 0 to 65535 (Pillow's modes `I;16`; `I` of PNG and PGM files) to 0 to 255. Other
  whole numbers (`I`) and floating-point ones (`F`) carry no range; it is the smallest of 0 to 1 (`F` only), 0 to 255
  and 0 to 65535 that holds the image's largest value. Negative, larger and undefined values are refused.
- Palettes are looked up, and other colour spaces (CMYK, LAB, YCbCr) converted, by Pillow.
- Alpha is dropped, not blended: a transparent pixel shows the colour that is stored there, as in timm and torchvision.
- Of several frames or pages the first is taken.
"""

from __future__ import annotations

import struct
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION = 0x0112  # EXIF's number of the tag
_STRAIGHT = 1
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode I is 16 bits wide, where Pillow says I

# What Pillow raises for files that are not what they seem.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def image_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the formats that this Pillow decodes by itself."""
    Image.init()
    # of these Pillow knows the header only, or runs another program
    stubs = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN and name not in stubs
    )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, _STRAIGHT))
    except (*UNREADABLE, TypeError, KeyError, IndexError):  # damaged metadata say nothing about the picture
        return _STRAIGHT


def _to_bytes(values: np.ndarray, top: float) -> Image.Image:
    return Image.fromarray(np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8))


def _grey(image: Image.Image, form: str | None) -> Image.Image:
    """8-bit grey of an image of mode `I;16`, `I` or `F`."""
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and form in _SIXTEEN_BITS):
        return _to_bytes(values, 65535)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):  # also true of NaN
        raise ValueError(f"its values, {low:g} to {high:g}, are in none of the known ranges: 0 to 1, 255 or 65535")
    return _to_bytes(values, 1 if image.mode == "F" and high <= 1 else 255 if high <= 255 else 65535)


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image in mode RGB, as the module says.

    Raises:
        UNREADABLE: damaged, or values of no known range.
    """
    form = image.format
    if _orientation(image) not in (_STRAIGHT, 0):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey(image, form)
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # Pillow warns otherwise; the colours are the same
    return image.convert("RGB")


def peculiarities(image: Image.Image) -> list[str]:
    """What is done to an opened image besides reading it, for people; empty for a plain one."""
    found = []
    if _orientation(image) not in (_STRAIGHT, 0):
        found.append("turned as their EXIF orientation says")
    if image.mode.startswith("I") or image.mode == "F":
        found.append("scaled from more than 8 bits to 8")
    if image.mode in ("P", "PA"):
        found.append("with a palette, looked up")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        found.append("with transparency, which is dropped")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        found.append(f"in {image.mode}, converted to RGB")
    if getattr(image, "n_frames", 1) > 1:
        found.append("with several frames, of which the first is taken")
    return found


def read_image(source: str | IO[Any]) -> Image.Image:
    """Decode a file to mode RGB.

    Args:
        source: path or open binary file.

    Raises:
        UNREADABLE: not an image, or a damaged one.
    """
    with Image.open(source) as image:
        return to_rgb(image)
