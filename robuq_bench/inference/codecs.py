"""Codecs of a packed file: ternary codes in base 3, codes of b bits, signs, matrices in int8.

The other ternary codec, 2-bit planes, is the layout that kernels read: `kernels.ternary_matmul`.
"""

from __future__ import annotations

import torch
from torch import Tensor

TRITS_PER_BYTE = 5
_POWERS = tuple(3**i for i in range(TRITS_PER_BYTE))


def encode_base3(codes: Tensor) -> Tensor:
    """Ternary codes {-1, 0, 1} int8 of any shape -> uint8 [ceil(numel / 5)], 1.6 bits a code.

    Code i of a byte is its digit of weight 3^i, plus one; the last byte is filled with zeros.

    Raises:
        ValueError: a code is not ternary.
    """
    digits = codes.reshape(-1).to(torch.int16) + 1
    if digits.numel() and (int(digits.min()) < 0 or int(digits.max()) > 2):
        raise ValueError("ternary codes must be -1, 0 or 1")
    padded = digits.new_zeros(-(-digits.numel() // TRITS_PER_BYTE) * TRITS_PER_BYTE)
    padded[: digits.numel()] = digits
    rows = padded.view(-1, TRITS_PER_BYTE)
    packed = torch.zeros_like(rows[:, 0])
    for i, power in enumerate(_POWERS):
        packed += rows[:, i] * power
    return packed.to(torch.uint8)


def decode_base3(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `encode_base3`: uint8 -> int8 codes of `shape`.

    Raises:
        ValueError: the bytes do not hold `shape`, or one is not a base-3 byte (above 242).
    """
    count = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (-(-count // TRITS_PER_BYTE),):
        raise ValueError(
            f"{list(shape)} ternary codes take uint8 [{-(-count // TRITS_PER_BYTE)}] in base 3, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    if packed.numel() and int(packed.max()) >= 3**TRITS_PER_BYTE:
        raise ValueError(f"byte {int(packed.max())} is no base-3 code, which end at 242")
    # A table of all 243 bytes: one gather instead of ten divisions.
    values = torch.arange(3**TRITS_PER_BYTE, dtype=torch.int16)
    table = torch.stack([values // power % 3 - 1 for power in _POWERS], 1).to(torch.int8)
    return table[packed.to(torch.int64)].view(-1)[:count].reshape(shape)


def encode_bits(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 of any shape -> uint8 [ceil(numel · bits / 8)], without gaps.

    One little-endian stream of bits: code i, plus 2^(bits-1), takes the bits i·bits to
    (i+1)·bits - 1, least significant first; bit k is bit k mod 8 of byte k div 8. Rows are not
    aligned, and the bits behind the last code are 0.

    Raises:
        ValueError: `bits` is not 2 to 8, or a code does not lie in [-2^(bits-1), 2^(bits-1) - 1].
    """
    _check_bits(bits)
    flat = codes.reshape(-1)
    half = 2 ** (bits - 1)
    if flat.dtype != torch.int8 or (
        flat.numel() and (int(flat.min()) < -half or int(flat.max()) >= half)
    ):
        raise ValueError(f"codes of {bits} bits must be int8 between {-half} and {half - 1}")
    count = flat.numel()
    # Eight codes are `bits` bytes, and one 64-bit word on the way.
    values = torch.zeros(-(-count // 8) * 8, dtype=torch.uint8, device=flat.device)
    values[:count] = (flat.to(torch.int16) + half).to(torch.uint8)
    words = _joined(values.view(-1, 8), bits)
    return _split(words, 8, bits).view(-1)[: -(-count * bits // 8)].clone()


def decode_bits(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `encode_bits`: uint8 -> int8 codes of `shape`.

    Raises:
        ValueError: `bits` is not 2 to 8, or the bytes do not hold `shape`.
    """
    _check_bits(bits)
    count = torch.Size(shape).numel()
    size = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (size,):
        raise ValueError(
            f"{list(shape)} codes of {bits} bits take uint8 [{size}], "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    values = torch.zeros(-(-count // 8) * bits, dtype=torch.uint8, device=packed.device)
    values[:size] = packed
    codes = _split(_joined(values.view(-1, bits), 8), bits, 8).view(-1)[:count]
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8).reshape(shape)


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"codes take 2 to 8 bits, not {bits}")


def _joined(parts: Tensor, bits: int) -> Tensor:
    """uint8 [n, k], each below 2^bits -> int64 [n], part j at bit j·bits; k·bits is 64 at most."""
    words = torch.zeros(len(parts), dtype=torch.int64, device=parts.device)
    for j in range(parts.shape[1]):
        words |= parts[:, j].to(torch.int64) << (bits * j)
    return words


def _split(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `_joined`: uint8 [n, count]."""
    mask = 2**bits - 1
    return torch.stack([((words >> (bits * j)) & mask).to(torch.uint8) for j in range(count)], 1)


def encode_signs(signs: Tensor) -> Tensor:
    """Signs ±1 [n] -> uint8 [ceil(n / 8)], bit i of a byte set where sign i is negative."""
    bits = (signs < 0).to(torch.uint8)
    padded = bits.new_zeros(-(-bits.numel() // 8) * 8)
    padded[: bits.numel()] = bits
    shifted = padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8)
    return shifted.sum(1, dtype=torch.uint8)


def decode_signs(packed: Tensor, n: int) -> Tensor:
    """The inverse of `encode_signs`: ±1 [n] float32. ValueError when the bytes do not hold n."""
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (-(-n // 8),):
        raise ValueError(f"{n} signs take uint8 [{-(-n // 8)}], got {list(packed.shape)}")
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return 1.0 - 2.0 * bits.view(-1)[:n].float()


def encode_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [r, c] as int8 codes [r, c] and one float32 scale per slice of its shorter side.

    Symmetric absmax: value = scale * code, |code| <= 127. For a low-rank factor the shorter side is
    the rank, so a scale costs little and a weak component keeps its own range.
    """
    axis = 1 if matrix.shape[0] <= matrix.shape[1] else 0
    scale = matrix.float().abs().amax(axis, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return (matrix.float() * inverse).round().to(torch.int8), scale.flatten()


def decode_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `encode_int8` up to rounding: float32 [r, c]."""
    if codes.dtype != torch.int8 or codes.dim() != 2 or scale.shape != (min(codes.shape),):
        raise ValueError(f"int8 {list(codes.shape)} does not go with scales {list(scale.shape)}")
    along_rows = codes.shape[0] <= codes.shape[1]
    return codes.float() * (scale[:, None] if along_rows else scale[None, :])
