"""Rotation and fake quantization of training: kernel, reference and the library's composition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.fake_quantize import reference, triton
from kernels.hadamard_quantize.reference import Grid, Rotation
from kernels.launch import KernelInputError
from robuq_bench.hadamard.rotation import random_signs, rotate
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.quantization.grids import grid_of, kernel_rotation

WIDTHS = [384, 768, 1024, 1152, 1536, 3072, 4096, 4608]  # DiT-S, B, L, XL and their hidden layers
SETTINGS = [
    ("robust-midtread", 1),
    ("robust-midtread", 2),
    ("robust-midtread", 4),
    ("robust-midtread", 8),
    ("robust-midrise", 3),
    ("minmax", 4),
    ("bitnet", 8),
    ("bitnet", 4),
]


def tokens(rows: int, width: int, device: torch.device, seed: int = 0) -> Tensor:
    """Tokens with a mean, heavy entries and very different norms, which rotation has to spread."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) + 0.3
    x[:, ::17] *= 6
    return (x * torch.logspace(-2, 2, rows)[:, None]).to(device)


def parts(width: int, device: torch.device) -> tuple[Rotation, Tensor]:
    return kernel_rotation(width, device), random_signs(width, "layer", 0).to(device)


def composition(
    x: Tensor, signs: Tensor | None, name: str, bits: int, *, rotated: bool = True
) -> tuple[Tensor, Tensor]:
    z = rotate(x, None if signs is None else signs.to(x.dtype)) if rotated else x
    return token_grid(name).fake_quantize(z, bits), z


def step(z: Tensor, grid: Grid) -> Tensor:
    """Size of a grid step per token [M, 1]."""
    centred = z - z.mean(-1, keepdim=True)
    statistic = {
        "mean-mad": centred.abs().mean(-1, keepdim=True),
        "min-max": z.amax(-1, keepdim=True) - z.amin(-1, keepdim=True),
        "absmax": z.abs().amax(-1, keepdim=True),
        "absmean": z.abs().mean(-1, keepdim=True),
    }[grid.statistic]
    return grid.factor * statistic


def relative(value: Tensor, truth: Tensor) -> float:
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    return float((value - truth).norm() / truth.norm())


@pytest.mark.parametrize(("name", "bits"), SETTINGS)
def test_reference_is_the_composition(name: str, bits: int, device: torch.device) -> None:
    x = tokens(7, 144, device).double().requires_grad_()
    rotation, signs = parts(144, device)
    grid = grid_of(name, bits)
    expected, z = composition(x, signs, name, bits)
    upstream, extra = torch.randn(2, 7, 144, generator=torch.Generator().manual_seed(1)).double()
    (truth,) = torch.autograd.grad([expected, z], [x], [upstream, extra])
    found = reference.fake_quantize(
        x.detach(), grid, rotation=rotation, signs=signs, want_rotated=True
    )
    assert found.rotated is not None
    assert relative(found.values, expected) < 1e-12
    assert relative(found.rotated, z) < 1e-12
    assert (found.state is not None) == name.startswith("robust")
    gradient = reference.fake_quantize_backward(
        upstream, found.state, grid, rotation=rotation, signs=signs, grad_rotated=extra
    )
    # The residuals are kept to 7 bits; what this moves shrinks as 1 / sqrt(width).
    assert relative(gradient, truth) < (1e-3 if found.state is not None else 1e-12)


def test_gradient_through_the_statistics_is_there() -> None:
    """The gradient differs from the plain straight-through one by far more than is allowed."""
    x = tokens(4, 144, torch.device("cpu")).double()
    grid = grid_of("robust-midtread", 2)
    state = reference.fake_quantize(x, grid, rotation=None).state
    assert state is not None
    upstream = torch.randn(4, 144, generator=torch.Generator().manual_seed(1)).double()
    clipped = (state == reference.CLIPPED) | (state == -1 - reference.CLIPPED)
    assert clipped.any()
    gradient = reference.fake_quantize_backward(upstream, state, grid, rotation=None)
    assert relative(gradient, upstream.masked_fill(clipped, 0.0)) > 0.02


@pytest.mark.parametrize(
    ("width", "name", "bits", "dtype"),
    [(width, "robust-midtread", 4, torch.float32) for width in [48, 144, 1408, *WIDTHS]]
    + [(144, name, bits, torch.float32) for name, bits in SETTINGS]
    + [(144, name, bits, torch.bfloat16) for name, bits in SETTINGS]
    + [(1152, "robust-midtread", 4, torch.bfloat16), (144, "robust-midrise", 4, torch.float16)],
)
def test_kernel_follows_the_composition(
    width: int, name: str, bits: int, dtype: torch.dtype, device: torch.device
) -> None:
    rows = 3 if width > 1000 else 19
    x = tokens(rows, width, device).to(dtype)
    rotation, signs = parts(width, device)
    grid = grid_of(name, bits)
    exact = x.double().requires_grad_()
    expected, z = composition(exact, signs, name, bits)
    found = triton.fake_quantize(x, grid, rotation=rotation, signs=signs, want_rotated=True)
    assert found.rotated is not None
    assert found.values.dtype == found.rotated.dtype == dtype
    unit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative(found.rotated, z) < unit
    steps = ((found.values.double() - expected) / step(z, grid)).abs()
    # A token on the edge of two codes may take either: one step, never two.
    rounding = unit * (expected / step(z, grid)).abs().amax(-1, keepdim=True)
    flipped = steps > 0.25 + rounding
    assert ((steps <= 0.01 + rounding) | ((steps - 1).abs() <= 0.01 + rounding)).all()
    assert flipped.double().mean() <= (1e-3 if dtype == torch.float32 else 0.02)

    upstream, extra = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(1))
    # As small as gradients get, far below the smallest number of fp16.
    size = 1.0 if dtype == torch.float16 else 1e-10
    upstream, extra = (t.to(device, dtype) * size for t in (upstream, extra))
    (truth,) = torch.autograd.grad([expected, z], [exact], [upstream.double(), extra.double()])
    gradient = triton.fake_quantize_backward(
        upstream, found.state, grid, rotation=rotation, signs=signs, grad_rotated=extra
    )
    same = ~flipped.any(-1)
    if found.state is None or dtype != torch.float32:
        same |= True
    assert same.any()
    tolerance = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}[dtype]
    assert gradient.dtype == dtype
    for row in same.nonzero().flatten():
        assert relative(gradient[row], truth[row]) < tolerance
    # Against the same state the only difference is rounding.
    same_state = reference.fake_quantize_backward(
        upstream.double(), found.state, grid, rotation=rotation, signs=signs,
        grad_rotated=extra.double(),
    )  # fmt: skip
    assert relative(gradient, same_state) < (2e-6 if dtype == torch.float32 else unit)


def test_programs_take_several_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(110, 144, device)  # 7 tiles of 16 rows, the last one ragged
    rotation, signs = parts(144, device)
    grid = grid_of("robust-midtread", 4)

    def both() -> tuple[Tensor, Tensor]:
        found = triton.fake_quantize(x, grid, rotation=rotation, signs=signs)
        gradient = triton.fake_quantize_backward(
            x, found.state, grid, rotation=rotation, signs=signs
        )
        return found.values, gradient

    expected = both()
    monkeypatch.setattr(triton, "LONG_TILES", 1)
    monkeypatch.setattr(triton, "LONG_ITERATIONS", 3)
    for value, truth in zip(both(), expected, strict=True):
        assert torch.equal(value, truth)


def test_strided_and_broadcast_gradients(device: torch.device) -> None:
    x = tokens(5, 144, device)
    grid = grid_of("robust-midtread", 4)
    state = triton.fake_quantize(x, grid, rotation=None).state
    wide = torch.randn(5, 160, generator=torch.Generator().manual_seed(2)).to(device)
    part = wide[:, :144]
    expected = triton.fake_quantize_backward(part.contiguous(), state, grid, rotation=None)
    found = triton.fake_quantize_backward(part, state, grid, rotation=None)
    assert torch.equal(found, expected)
    ones = torch.ones(1, 1, device=device).expand(5, 144)
    found = triton.fake_quantize_backward(ones, state, grid, rotation=None)
    expected = triton.fake_quantize_backward(ones.contiguous(), state, grid, rotation=None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_results_in_another_dtype(out_dtype: torch.dtype, device: torch.device) -> None:
    """Autocast: float32 activations, bfloat16 products, and the gradient in float32 again."""
    x = tokens(4, 144, device)
    rotation, signs = parts(144, device)
    grid = grid_of("robust-midtread", 8)
    found = triton.fake_quantize(x, grid, rotation=rotation, signs=signs, out_dtype=out_dtype)
    assert found.values.dtype == out_dtype
    assert found.state is not None
    assert found.state.dtype == torch.int8
    assert found.state.shape == x.shape
    assert relative(found.values, composition(x.double(), signs, "robust-midtread", 8)[0]) < 2e-2
    gradient = triton.fake_quantize_backward(
        found.values, found.state, grid, rotation=rotation, signs=signs, out_dtype=torch.float32
    )
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["robust-midtread", "robust-midrise", "minmax", "bitnet"])
@pytest.mark.parametrize("width", [1, 100])
def test_without_rotation_any_width_and_any_token(
    width: int, name: str, device: torch.device
) -> None:
    x = tokens(6, width, device)
    x[0], x[1] = 0.0, 2.5
    found = triton.fake_quantize(x, grid_of(name, 4), rotation=None)
    expected, _ = composition(x, None, name, 4, rotated=False)
    assert (found.values[:2] - expected[:2]).abs().max() < 1e-5
    assert relative(found.values[2:], expected[2:]) < 1e-5
    upstream = torch.randn(6, width, generator=torch.Generator().manual_seed(1)).to(device)
    leaf = x.clone().requires_grad_()
    composition(leaf, None, name, 4, rotated=False)[0].backward(upstream)
    gradient = triton.fake_quantize_backward(upstream, found.state, grid_of(name, 4), rotation=None)
    assert leaf.grad is not None
    assert (gradient - leaf.grad).abs().max() < 5e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["robust-midtread", "robust-midrise"])
def test_infinite_entries_saturate_and_nan_stays(name: str, device: torch.device) -> None:
    x = tokens(4, 36, device)
    x[1, 3], x[2, 5], x[3, 7] = math.inf, -math.inf, math.nan
    grid = grid_of(name, 4)
    found = triton.fake_quantize(x, grid, rotation=None)
    expected, _ = composition(x, None, name, 4, rotated=False)
    torch.testing.assert_close(found.values, expected, equal_nan=True)
    assert found.values[3, 7].isnan()
    upstream = torch.randn(4, 36, generator=torch.Generator().manual_seed(1)).to(device)
    leaf = x.clone().requires_grad_()
    composition(leaf, None, name, 4, rotated=False)[0].backward(upstream)
    gradient = triton.fake_quantize_backward(upstream, found.state, grid, rotation=None)
    assert leaf.grad is not None
    torch.testing.assert_close(gradient[:3], leaf.grad[:3], rtol=2e-3, atol=2e-3)
    truth = reference.fake_quantize(x, grid, rotation=None).state
    assert found.state is not None
    assert truth is not None
    assert torch.equal(found.state[1:3], truth[1:3])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["robust-midtread", "minmax", "bitnet"])
def test_tokens_of_one_infinity(name: str, device: torch.device) -> None:
    x = tokens(4, 36, device)
    x[1], x[2] = math.inf, -math.inf
    grid = grid_of(name, 4)
    found = triton.fake_quantize(x, grid, rotation=None).values
    assert bool(found.isfinite().all())
    expected, _ = composition(x, None, name, 4, rotated=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    wanted = reference.fake_quantize(x, grid, rotation=None).values
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_reaches_every_entry_of_a_rotated_token(device: torch.device) -> None:
    x = tokens(3, 144, device)
    x[1, 0] = math.nan
    rotation, signs = parts(144, device)
    found = triton.fake_quantize(x, grid_of("robust-midtread", 4), rotation=rotation, signs=signs)
    assert found.values.isnan().all(-1).tolist() == [False, True, False]


def test_no_state_without_need(device: torch.device) -> None:
    x = tokens(2, 144, device)
    grid = grid_of("robust-midtread", 4)
    assert triton.fake_quantize(x, grid, rotation=None, save=False).state is None
    assert triton.fake_quantize(x, grid_of("minmax", 4), rotation=None).state is None


def test_no_tokens(device: torch.device) -> None:
    x = torch.zeros(0, 144, device=device)
    grid = grid_of("robust-midtread", 4)
    found = triton.fake_quantize(x, grid, rotation=None, want_rotated=True)
    assert found.values.shape == x.shape
    assert triton.fake_quantize_backward(x, found.state, grid, rotation=None).shape == x.shape


def test_errors_say_what_is_supported(device: torch.device) -> None:
    grid = grid_of("robust-midtread", 4)
    rotation, signs = parts(144, device)
    x = torch.zeros(2, 144, device=device)
    with pytest.raises(KernelInputError, match=r"must be torch\.|must be bfloat16"):
        triton.fake_quantize(x.double(), grid, rotation=None)
    with pytest.raises(KernelInputError, match="contiguous"):
        triton.fake_quantize(torch.zeros(144, 2, device=device).t(), grid, rotation=None)
    with pytest.raises(KernelInputError, match="order 144"):
        triton.fake_quantize(torch.zeros(2, 36, device=device), grid, rotation=rotation)
    with pytest.raises(KernelInputError, match="signs"):
        triton.fake_quantize(x, grid, rotation=rotation, signs=signs.double())
    with pytest.raises(KernelInputError, match="up to"):
        triton.fake_quantize(torch.zeros(1, 9000, device=device), grid, rotation=None)
    with pytest.raises(KernelInputError, match="order 68; kernels take up to 64"):
        triton.fake_quantize(
            torch.zeros(1, 68, device=device), grid, rotation=kernel_rotation(68, device)
        )
    with pytest.raises(KernelInputError, match="state"):
        triton.fake_quantize_backward(x, None, grid, rotation=None)
    with pytest.raises(KernelInputError, match="grad_rotated"):
        triton.fake_quantize_backward(
            x,
            torch.zeros(2, 144, dtype=torch.int8, device=device),
            grid,
            rotation=None,
            grad_rotated=torch.zeros(2, 143, device=device),
        )
