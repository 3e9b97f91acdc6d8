"""Images in every form that Pillow decodes, as upright RGB: the one loader of engine, service, client, chat and commands."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from labkit.common.errors import MediaError
from labkit.common.media import Encoded, name_of, read_bytes

MAX_PIXELS = 50_000_000
"""The largest accepted image (a phone's screenshot has 2 to 5 million pixels)."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "ICO", "PPM") + (
    ("AVIF",) if features.check("avif") else ()
)
"""The formats that Pillow decodes itself; for PostScript it starts another program."""
MAX_ASPECT = 100
"""The largest ratio of an image's sides; the processors refuse more than 200."""
OVERSHOOT = 0.05
"""How far floating-point pixels may leave their range, as a share of it; beyond that the range is unknown."""
DARKEST = 16
"""The largest value of a picture whose range is guessed is at least this part of the range."""


def image_format(data: bytes) -> str | None:
    """The format in which bytes hold an image (``PNG``, ``TIFF``, …; also of one that is broken), or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).format
    except UnidentifiedImageError:
        return None
    except Exception:  # Pillow's decoders raise many kinds on broken headers; `load_image` says which
        return "broken"


def load_image(source: Image.Image | Encoded, name: str | None = None) -> Image.Image:
    """An image (PIL, path, encoded bytes, ``data:`` URL) as an upright PIL image in RGB, 8 bits a channel.

    Transparency becomes white; of an animation the first frame is taken. Grey pixels of 16 or 32 bits keep their
    range: that of the file's integers of up to 16 bits, else 0..1, 0..255, 0..65535 (or integers' own range), the
    smallest that holds all pixels. ``name`` stands for the image in messages.

    Raises:
        MediaError: not an image, broken, larger than ``MAX_PIXELS``, a strip beyond ``MAX_ASPECT`` : 1, or pixels of
            an unknown range.
    """
    name = name or name_of(source, "image")
    if not isinstance(source, Image.Image | Encoded):
        raise MediaError(
            f"an image is a PIL image, a path, bytes or a data: URL, not {type(source).__name__}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on large pictures and on broken EXIF, with paths of this machine
        image = source if isinstance(source, Image.Image) else _open_image(read_bytes(source, "image"), name)
        _check_size(image, name)
        try:
            key = _transparent_colour(image)  # before anything is decoded, see there
            return _to_rgb(ImageOps.exif_transpose(image), key, image)
        except MediaError as error:
            raise MediaError(f"{name} {error}") from None
        except Exception as error:
            raise MediaError(f"{name} is broken: {error}") from None


def to_png(image: Image.Image) -> bytes:
    """An image as `load_image` gives it, as a PNG file: the form for services that read images in another way."""
    buffer = io.BytesIO()
    load_image(image).save(
        buffer, "PNG", compress_level=1
    )  # in a tenth of the time, for a few percent of bytes
    return buffer.getvalue()


def _open_image(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError:
        raise MediaError(
            f"{name} has too many pixels; at most {MAX_PIXELS:,} are accepted: scale it down"
        ) from None
    except UnidentifiedImageError:
        raise MediaError(
            f"{name} is not an image that can be read ({len(data)} bytes; PNG, JPEG, WebP, ... can)"
        ) from None
    except Exception as error:  # Pillow's decoders raise many kinds on broken headers
        raise MediaError(f"{name} is broken: {error}") from None


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height == 0:
        raise MediaError(f"{name} has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} are accepted: scale it down"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise MediaError(
            f"{name} is a strip of {width} x {height}; sides may differ {MAX_ASPECT} times at most"
        )


def _transparent_colour(image: Image.Image) -> int | tuple[int, ...] | bytes | None:
    """The colour that a PNG (tRNS) or GIF declares transparent, at the depth of the decoded pixels.

    Pillow brings 2, 4 and 16 bits a channel to 8 and leaves this colour as the file has it; only the tile's raw mode
    tells, and decoding drops it.
    """
    key = image.info.get("transparency")
    raw = image.tile[0][3] if isinstance(image, ImageFile) and image.tile else None
    if isinstance(key, tuple):
        deep = raw == "RGB;16B" or max(key) > 255
        return tuple(value >> 8 if deep else value for value in key)
    if isinstance(key, int) and image.mode == "L":
        return key * {"L;2": 85, "L;4": 17}.get(raw, 1) & 0xFF
    return key


def _to_rgb(
    image: Image.Image, key: int | tuple[int, ...] | bytes | None, original: Image.Image
) -> Image.Image:
    """The upright image as RGB; ``original`` still has the file's format and tags."""
    if image.mode.startswith(("I", "F")):
        grey = Image.fromarray(_to_8_bits(np.asarray(image), original))
        if isinstance(key, int):
            grey.paste(255, mask=Image.fromarray(np.asarray(image) == key))
        return grey.convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if key is not None or image.has_transparency_data:
        if key is not None and image.info.get("transparency") != key:
            image = image.copy()  # never change the caller's image
            image.info["transparency"] = key
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
_WHITE_IS_ZERO, _SIGNED = 0, 2


def _to_8_bits(pixels: np.ndarray, original: Image.Image) -> np.ndarray:
    """Grey pixels of more than 8 bits as uint8 [height, width].

    Raises:
        MediaError: a range that cannot be known; the message has no subject.
    """
    tags = original.tag_v2 if isinstance(original, TiffImageFile) else {}
    deep = 16 if original.mode.startswith("I;16") or original.format == "PPM" else 32
    bits = tags.get(_BITS, (deep,))[0]
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    if pixels.dtype.kind == "f":
        tops: tuple[int, ...] = (1, 255, 65535)
    elif bits <= 16:
        tops = (2 ** (bits - signed) - 1,)
    else:
        if tags and not signed:
            pixels = pixels.view(np.uint32)  # Pillow has no unsigned pixels of 32 bits
        tops = (255, 65535, 2**31 - 1, 2**32 - 1)
    low, high = pixels.min(), pixels.max()
    slack = OVERSHOOT if pixels.dtype.kind == "f" else 0
    top = next((top for top in tops if high <= top * (1 + slack)), None)
    # Values far below the range that holds them would make a picture that is nearly black: they have another range.
    if top is None or low < -slack * top or (top > tops[0] and high < top / DARKEST):
        raise MediaError(
            f"has grey values from {low:g} to {high:g}, whose range is unknown: "
            f"give 0 to {' or 0 to '.join(map(str, tops))}, or save it with 8 bits"
        )
    if pixels.dtype.kind == "f":
        grey = np.rint(np.clip(pixels / pixels.dtype.type(top), 0, 1) * 255).astype(np.uint8)
    else:
        grey = (pixels.astype(np.uint32) >> (top.bit_length() - 8)).astype(np.uint8)
    # Pillow inverts these in 8 bits only.
    return 255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey
