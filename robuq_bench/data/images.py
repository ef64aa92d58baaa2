"""One image file as 8-bit pixels: what may be read, how it is converted, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, TiffImagePlugin

from robuq_bench.errors import CheckpointError

Pixels = npt.NDArray[np.uint8]

# Named, so that a file of another kind cannot start what Pillow has for it (Ghostscript for EPS).
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_MIN_IS_WHITE = 258, 262, 0
# A transparent grey is stated in the file's few bits, while Pillow spreads its pixels over eight.
GREY_STEPS = {"L;2": 85, "L;4": 17}
EXIF_ORIENTATION = 0x0112
TRANSPARENT = "with transparency, laid over white"
ROTATED = "with an EXIF rotation, which is not applied (as in ADM's protocol)"
COLOUR = "in colour, converted to grey (ITU-R 601) because data.channels is 1"


def read_image(file: Path, size: int, channels: int) -> tuple[Pixels, list[str]]:
    """Read an image, crop and resize it by `center_crop`; uint8 [channels, size, size].

    Grey of 9 to 16 bits is scaled to 8 (16: v / 257, rounded) and transparency laid over white.
    CMYK and other colour spaces are converted as Pillow does, without colour profiles. Signed and
    32-bit integers and floats, whose range a file does not tell, and animations or stacks of pages
    are refused.

    Returns:
        The pixels, and remarks that the user should hear of.

    Raises:
        CheckpointError: not a readable image, or one that is refused; names the file.
    """
    try:
        with Image.open(file, formats=FORMATS) as opened:
            refusal = _refusal(opened)
            if refusal is None:
                stored_as = _stored_as(opened)  # forgotten once loaded
                opened.load()
                if stored_as in GREY_STEPS and "transparency" in opened.info:
                    opened.info["transparency"] *= GREY_STEPS[stored_as]
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
    # Of a PNG or PGM, Pillow's "I" is 16 bits without a sign, whatever a PGM's largest value is.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        integers = "signed 16-bit" if "16" in _stored_as(image) else "32-bit"
        kind = "floating-point numbers" if image.mode == "F" else f"{integers} integers"
        return f"holds {kind}, whose range is not known; convert it to 8 or 16 bits"
    if "transparency" in image.info and _stored_as(image) == "RGB;16B":
        return "holds 16-bit colours of which one is transparent; save it with an alpha channel"
    return None


def _stored_as(image: Image.Image) -> str:
    """Pillow's name of the pixels in the file of an image that is not yet loaded, e.g. "L;4"."""
    args = image.tile[0].args if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    return str(args[0]) if isinstance(args, tuple) and args else str(args)


def _to_eight_bits(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """An image of 8 bits per channel without transparency, and remarks."""
    if image.mode in SIXTEEN_BITS or image.mode == "I":
        return _sixteen_to_eight_bits(image)
    if not image.has_transparency_data:
        return image, []
    layered = image.convert("RGBA")
    if (np.asarray(layered.getchannel("A")) == 255).all():
        return layered.convert("RGB"), []
    white = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(white, layered).convert("RGB"), [TRANSPARENT]


def _sixteen_to_eight_bits(image: Image.Image) -> tuple[Image.Image, list[str]]:
    grey = np.asarray(image).astype(np.int64)
    most, is_inverted = 65535, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow heeds neither at 16 bits
        most = (1 << image.tag_v2[TIFF_BITS][0]) - 1
        is_inverted = image.tag_v2.get(TIFF_PHOTOMETRIC, 0) == TIFF_MIN_IS_WHITE
    eight = (grey * 255 + most // 2) // most
    eight = 255 - eight if is_inverted else eight
    is_clear = grey == image.info.get("transparency", -1)
    eight[is_clear] = 255
    return Image.fromarray(eight.astype(np.uint8)), [TRANSPARENT] if is_clear.any() else []


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
