"""One image file as 8-bit pixels: what may be read, how it is converted, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from robuq_bench.errors import CheckpointError

Pixels = npt.NDArray[np.uint8]

# Named, so that a file of another kind cannot start what Pillow has for it (Ghostscript for EPS).
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
EXIF_ORIENTATION = 0x0112
TRANSPARENT = "with transparency, laid over white"
ROTATED = "with an EXIF rotation, which is not applied (as in ADM's protocol)"
COLOUR = "in colour, converted to grey (ITU-R 601) because data.channels is 1"


def read_image(file: Path, size: int, channels: int) -> tuple[Pixels, list[str]]:
    """Read an image, crop and resize it by `center_crop`; uint8 [channels, size, size].

    16-bit grey is scaled to 8 bits (v / 257, rounded) and transparency laid over white. CMYK and
    other colour spaces are converted as Pillow does, without colour profiles. 32-bit integers and
    floats, whose range a file does not tell, and animations or stacks of pages are refused.

    Returns:
        The pixels, and remarks that the user should hear of.

    Raises:
        CheckpointError: not a readable image, or one that is refused; names the file.
    """
    try:
        with Image.open(file, formats=FORMATS) as opened:
            refusal = _refusal(opened)
            if refusal is None:
                opened.load()
                image, remarks = _to_eight_bits(opened)
                remarks += [ROTATED] if _is_rotated(opened) else []
                cropped = center_crop(image.convert("RGB"), size)
    except Exception as error:  # a damaged image can make a decoder raise anything
        reason = f"{error}" or type(error).__name__
        raise CheckpointError(
            f"{file} is not a readable image ({reason}); replace or remove it"
        ) from error
    if refusal is not None:
        raise CheckpointError(f"{file} {refusal}")
    if channels == 1:
        colours = np.asarray(cropped)
        if (colours != colours[..., :1]).any():
            remarks.append(COLOUR)
        cropped = center_crop(image.convert("L"), size)
    pixels = np.asarray(cropped, dtype=np.uint8).reshape(size, size, channels)
    return pixels.transpose(2, 0, 1).copy(), remarks


def _refusal(image: Image.Image) -> str | None:
    # A photograph with an embedded preview (MPO) has several frames too; the first is the picture.
    frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
    if frames > 1:
        return f"holds {frames} frames or pages; save the one that is meant by itself"
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        return f"holds {kind}, whose range is not known; convert it to 8 or 16 bits"
    return None


def _to_eight_bits(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """An image of 8 bits per channel without transparency, and remarks."""
    if image.mode in SIXTEEN_BITS or image.mode == "I":  # "I": a 16-bit PNG in older Pillow
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)), []
    if not image.has_transparency_data:
        return image, []
    layered = image.convert("RGBA")
    if (np.asarray(layered.getchannel("A")) == 255).all():
        return layered.convert("RGB"), []
    white = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(white, layered).convert("RGB"), [TRANSPARENT]


def _is_rotated(image: Image.Image) -> bool:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF says nothing of the pixels, which are sound
        return False


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop to size x size as ADM does: halve with BOX while the short side is at least 2 size,
    resize it to `size` with BICUBIC, then cut the centre (offsets floor((side - size) / 2)).

    Source: openai/guided-diffusion, image_datasets.py (protocol only); EXIF rotation is ignored.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
