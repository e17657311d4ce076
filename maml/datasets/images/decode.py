"""From encoded images to pixels, and error messages for those that cannot be read."""

import functools
import hashlib
import io
import sys

import numpy as np
from PIL import Image, ImageOps

from maml.datasets.images.source import Decode, ImageFile
from maml.errors import UserError

# Of images. Pillow knows more, but one of those has Ghostscript run what is in the file, and others unpack
# without a bound.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MOST_PIXELS = 50_000_000  # of an image that has to be decoded whole


def decode_drawing(raw: bytes | np.ndarray, *, side: int) -> np.ndarray:
    """Ink 1 on paper 0, uint8 [side, side, 1], by nearest neighbour as Pillow resizes 1-bit images."""
    with open_image(raw) as drawing:
        check_size(drawing)
        grey = np.asarray(drawing.convert("L").resize((side, side), Image.Resampling.NEAREST))
    return (grey < 128).astype(np.uint8)[..., None]


def open_image(raw: bytes | np.ndarray) -> Image.Image:
    """An encoded image, not yet decoded, or one that was decoded already."""
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    return Image.open(io.BytesIO(raw), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_size(image: Image.Image) -> None:
    """A file of a few bytes can hold an image that fills the memory."""
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(
            f"{image.width}×{image.height} pixels, expected at most {MOST_PIXELS:,}; make it smaller"
        )


def decode_photograph(raw: bytes | np.ndarray, *, side: int) -> np.ndarray:
    """The centre square as RGB, uint8 [side, side, 3]: upright, transparency over white, antialiased."""
    with open_image(raw) as image:
        # A JPEG much too large is decoded at half, a quarter, an eighth of its size, which saves most time.
        image.draft(None, (2 * side, 2 * side))
        check_size(image)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits of gray, which convert() would clip at 255
            image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("pixels are fractions of no known range")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    left, top = (image.width - min(image.size)) / 2, (image.height - min(image.size)) / 2
    box = (left, top, image.width - left, image.height - top)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS, box))


SHOWN = 5  # bad images named in a message
PROBLEM = 200  # characters of what is wrong with one: a decoder may quote the file


def report_bad_images(name: str, bad: list[str], skip_bad_images: bool) -> None:
    """Says which images were left out, if there are any; a UserError unless they were to be."""
    if bad and not skip_bad_images:
        raise UserError(
            f"{name}: {len(bad)} {'image' if len(bad) == 1 else 'images'} cannot be read: {_some(bad)}. "
            f"Needed all: replace them, or leave them out with --skip_bad_images."
        )
    if bad:
        _say(f"{name}: left out {len(bad)} bad images: {_some(bad)}")


def _some(items: list[str], shown: int = SHOWN) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return "; ".join(items[:shown]) + more


def _say(text: str) -> None:  # names of files are in it, and so whatever their giver put there
    print("".join(c if c.isprintable() else "?" for c in text), file=sys.stderr, flush=True)


HEIC = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypheim", b"ftypmif1", b"ftypmsf1")


def _unknown(raw: bytes) -> str:
    """The message for a file in none of the formats."""
    if raw[4:12] in HEIC:
        return "HEIC, expected JPEG or PNG; convert it, or set the iPhone's camera to Most Compatible"
    return "not an image"


def read_and_decode(
    file: ImageFile, decode: Decode, shape: tuple[int, int, int]
) -> tuple[np.ndarray | None, bytes, str]:
    """The image, a digest of what was read, and what is wrong with it ("" if nothing is)."""
    try:
        raw = file.read()
        if len(raw) == 0:
            return None, b"", "no bytes"
        image = decode(raw)
        if image.dtype != np.uint8 or image.shape != shape:
            return None, b"", f"decoded to {image.dtype} {image.shape}, expected uint8 {shape}"
        content = raw.tobytes() if isinstance(raw, np.ndarray) else raw
        return image, hashlib.blake2b(content, digest_size=16).digest(), ""
    except UserError:
        raise
    except Exception as error:  # decoders answer a broken file with anything from OSError to SyntaxError
        # Pillow names its buffer where it does not know the format, which helps nobody.
        text = _unknown(raw) if "cannot identify image" in str(error) else str(error)
        return None, b"", text[:PROBLEM] or type(error).__name__
