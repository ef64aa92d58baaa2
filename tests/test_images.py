"""Image files of every kind that Pillow opens: right pixels, or refused by name."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robuq_bench.data.images import read_image
from robuq_bench.errors import CheckpointError

RAMP = np.arange(64).reshape(8, 8)
RGB = np.stack([RAMP * 4, 255 - RAMP * 4, RAMP * 2], -1).astype(np.uint8)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    path = save(tmp_path / name, Image.fromarray(values))
    pixels, remarks = read_image(path, 8, 1)
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    assert np.array_equal(pixels[0], expected)
    assert (pixels.min(), pixels.max(), remarks) == (0, 255, [])
    colour, _ = read_image(path, 8, 3)
    assert np.array_equal(colour, np.repeat(expected[None], 3, 0))


def test_big_endian_sixteen_bits(tmp_path: Path) -> None:
    values = (RAMP * 1040).astype(">u2")
    image = Image.frombytes("I;16B", (8, 8), values.tobytes())
    pixels, _ = read_image(save(tmp_path / "a.tif", image), 8, 1)
    assert np.array_equal(pixels[0], np.floor(RAMP * 1040 / 257 + 0.5))


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integers"), (np.float32, "float")])
def test_a_range_that_is_not_known_is_refused(tmp_path: Path, dtype: type, kind: str) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray((RAMP * 9).astype(dtype)))
    with pytest.raises(CheckpointError, match=rf"a\.tif holds {kind}.*convert"):
        read_image(path, 8, 1)


def tiff(pixels: bytes, *, bits: int, photometric: int, sample_format: int = 1) -> bytes:
    """An 8x8 little-endian TIFF of one uncompressed strip; Pillow writes none of these."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: 8,
            279: len(pixels), 339: sample_format}  # fmt: skip
    fields = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4) + pixels


def png(pixels: bytes, *, bits: int, colour: int = 0, clear: bytes = b"") -> bytes:
    """An 8x8 PNG of grey (0) or RGB (2) whose colour `clear` is transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    stride = len(pixels) // 8
    rows = b"".join(b"\0" + pixels[i * stride : (i + 1) * stride] for i in range(8))
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBB3x", 8, 8, bits, colour))]
    parts += [chunk(b"tRNS", clear)] if clear else []
    return b"".join([*parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("photometric", [0, 1])
def test_a_tiff_whose_least_value_is_white(tmp_path: Path, bits: int, photometric: int) -> None:
    factor = 1 if bits == 8 else 257
    stored = (RAMP * 4 * factor).astype(f"<u{bits // 8}").tobytes()
    path = written(tmp_path / "a.tif", tiff(stored, bits=bits, photometric=photometric))
    pixels, _ = read_image(path, 8, 1)
    assert np.array_equal(pixels[0], RAMP * 4 if photometric else 255 - RAMP * 4)


def test_twelve_bits_span_the_same_range_as_eight(tmp_path: Path) -> None:
    values = np.linspace(0, 4095, 64).astype(int)
    pairs = [(a << 12) | b for a, b in values.reshape(-1, 2).tolist()]
    stored = b"".join(pair.to_bytes(3, "big") for pair in pairs)
    path = written(tmp_path / "a.tif", tiff(stored, bits=12, photometric=1))
    pixels, _ = read_image(path, 8, 1)
    assert np.array_equal(pixels.ravel(), np.floor(values * 255 / 4095 + 0.5))


def test_signed_sixteen_bits_are_called_so(tmp_path: Path) -> None:
    stored = RAMP.astype("<i2").tobytes()
    data = tiff(stored, bits=16, photometric=1, sample_format=2)
    with pytest.raises(CheckpointError, match=r"a\.tif holds signed 16-bit integers"):
        read_image(written(tmp_path / "a.tif", data), 8, 1)


@pytest.mark.parametrize("most", [15, 255, 1023, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_a_pgm_spans_the_range_that_it_states(tmp_path: Path, most: int, plain: bool) -> None:
    values = (RAMP * most + 31) // 63
    if plain:
        data = b"P2 8 8 %d\n%s" % (most, b" ".join(b"%d" % v for v in values.ravel()))
    else:
        data = b"P5 8 8 %d\n" % most + values.astype(">u2" if most > 255 else "u1").tobytes()
    pixels, remarks = read_image(written(tmp_path / "a.pgm", data), 8, 1)
    assert np.array_equal(pixels[0], np.floor(values * 255 / most + 0.5))
    assert remarks == []


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_grey_that_is_transparent_is_white(tmp_path: Path, bits: int) -> None:
    """Its value is in the file's bits: 1 of 0..3 is not 1 of 0..255."""
    most = (1 << bits) - 1
    values = (RAMP * most // 63).ravel()
    clear = int(values[40]) if bits > 1 else 0
    if bits == 16:
        stored = values.astype(">u2").tobytes()
    else:
        digits = np.unpackbits(values.astype(np.uint8)[:, None], axis=1)[:, -bits:]
        stored = np.packbits(digits).tobytes()
    data = png(stored, bits=bits, clear=struct.pack(">H", clear))
    pixels, remarks = read_image(written(tmp_path / "a.png", data), 8, 1)
    expected = np.floor(values * 255 / most + 0.5)
    assert np.array_equal(pixels.ravel(), np.where(values == clear, 255, expected))
    assert remarks == ["with transparency, laid over white"]


def test_one_transparent_colour_of_sixteen_bits_is_refused(tmp_path: Path) -> None:
    """Pillow keeps the upper eight bits of the pixels, so others would be transparent too."""
    stored = np.repeat(RAMP.astype(">u2"), 3).tobytes()
    data = png(stored, bits=16, colour=2, clear=bytes(6))
    with pytest.raises(CheckpointError, match=r"a\.png holds 16-bit colours.*alpha channel"):
        read_image(written(tmp_path / "a.png", data), 8, 3)
    opaque = png(stored, bits=16, colour=2)
    assert read_image(written(tmp_path / "b.png", opaque), 8, 3)[1] == []


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_pillow_does(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    name = "a.tif" if mode in ("CMYK", "YCbCr") else "a.png"
    path = save(tmp_path / name, image)
    pixels, remarks = read_image(path, 8, 3)
    assert np.array_equal(pixels.transpose(1, 2, 0), np.asarray(image.convert("RGB")))
    assert remarks == []


def with_alpha(mode: str, alpha: int) -> Image.Image:
    image = Image.fromarray(RGB).convert("L" if mode == "LA" else "RGB")
    image.putalpha(Image.fromarray(np.full((8, 8), alpha, np.uint8)))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize(("alpha", "weight"), [(0, 0.0), (51, 0.2), (255, 1.0)])
def test_transparency_is_laid_over_white(
    tmp_path: Path, mode: str, alpha: int, weight: float
) -> None:
    image = with_alpha(mode, alpha)
    pixels, remarks = read_image(save(tmp_path / "a.png", image), 8, 3)
    under = np.asarray(image.convert("RGB")).astype(float)
    expected = (weight * under + (1 - weight) * 255).transpose(2, 0, 1)
    assert np.abs(pixels - expected).max() <= 1
    assert remarks == ([] if alpha == 255 else ["with transparency, laid over white"])


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 10, 10, 0, 0, 0])
    image.putpixel((0, 0), 1)
    path = save(tmp_path / "a.png", image, transparency=0)
    pixels, remarks = read_image(path, 8, 3)
    assert pixels[:, 0, 0].tolist() == [0, 0, 0]
    assert pixels[:, 1, 1].tolist() == [255, 255, 255]
    assert remarks == ["with transparency, laid over white"]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_animations_and_stacks_are_refused(tmp_path: Path, name: str) -> None:
    frames = [Image.fromarray(np.roll(RGB, k, 0)) for k in (1, 2)]
    path = tmp_path / name
    Image.fromarray(RGB).save(path, save_all=True, append_images=frames)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} holds 3 frames"):
        read_image(path, 8, 3)


def test_the_preview_of_a_photograph_is_no_second_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    photograph = Image.fromarray(RGB)
    photograph.save(path, "MPO", save_all=True, append_images=[photograph])
    assert read_image(path, 8, 3)[0].shape == (3, 8, 8)


def test_an_exif_rotation_is_not_applied_but_told(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.png", Image.fromarray(RGB), exif=exif)
    pixels, remarks = read_image(path, 8, 3)
    assert np.array_equal(pixels.transpose(1, 2, 0), RGB)
    assert len(remarks) == 1
    assert "EXIF rotation" in remarks[0]


def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(RGB), exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    assert read_image(path, 8, 3)[1] == []


def test_colour_is_made_grey_with_a_remark(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(RGB))
    pixels, remarks = read_image(path, 8, 1)
    assert np.array_equal(pixels[0], np.asarray(Image.fromarray(RGB).convert("L")))
    assert "in colour" in remarks[0]
    grey = save(tmp_path / "b.png", Image.fromarray(np.repeat(RAMP[..., None], 3, 2).astype("u1")))
    assert read_image(grey, 8, 1)[1] == []


@pytest.mark.parametrize("kind", ["EPS", "PCX"])
def test_what_the_name_hides_is_not_opened(tmp_path: Path, kind: str) -> None:
    """Pillow goes by content, and would start Ghostscript for EPS."""
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path, kind)
    with pytest.raises(CheckpointError, match=r"a\.png is not a readable image"):
        read_image(path, 8, 3)


def test_a_decompression_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(RGB))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(CheckpointError, match=r"a\.png.*decompression bomb"):
        read_image(path, 8, 3)


def encoded(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, kind, **options)
    return stream.getvalue()


SOUND = [encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]


def cut(data: bytes, share: float, place: float, value: int) -> bytes:
    damaged = bytearray(data[: int(share * len(data))])
    if damaged:
        damaged[int(place * (len(damaged) - 1))] ^= value
    return bytes(damaged)


fractions = st.floats(0, 1)
damaged_images = st.builds(cut, st.sampled_from(SOUND), fractions, fractions, st.integers(0, 255))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150)
@given(st.binary(max_size=200) | damaged_images)
def test_any_bytes_are_an_image_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "victim.png"
    path.write_bytes(content)
    shape_or_refusal = read_or_complain(path)
    assert shape_or_refusal == (3, 8, 8) or "victim.png" in str(shape_or_refusal)


def read_or_complain(path: Path) -> tuple[int, ...] | str:
    try:
        return read_image(path, 8, 3)[0].shape
    except CheckpointError as error:
        return str(error)
