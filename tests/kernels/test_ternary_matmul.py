"""Ternary matrix multiplication: the reference against float64, every kernel against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.launch import INTERPRETED, KernelInputError
from kernels.ternary_matmul import reference
from kernels.ternary_matmul import triton as launchers
from kernels.ternary_matmul.layout import pack_planes
from kernels.ternary_matmul.tiles import (
    ALIGNED_WIDTH,
    TILES,
    VARIANTS,
    Tile,
    Variant,
    candidates,
    choose_variant,
    default_tile,
)
from kernels.ternary_matmul.triton import (
    autotune,
    grouped_ternary_matmul,
    ternary_matmul,
    tuning,
)

VECTORS = ("token_scale", "token_offset", "code_sums", "channel_scale", "weight_sums")

# Small blocks: they cross more edges, and the interpreter's time grows with masked work.
SMALL: dict[Variant, Tile] = {
    "tile": Tile(32, 16, 32, 4, 2),
    "skinny": Tile(32, 16, 64, 4, 2, 3),
    "scratch": Tile(32, 16, 32, 4, 2),
}

EPILOGUES: dict[str, dict[str, Any]] = {
    "dequant": {},
    "bias": {"bias": torch.float32},
    "low rank": {"bias": torch.bfloat16, "rank": 16},
    "odd rank, float32": {"bias": torch.float32, "rank": 5, "up": torch.float32},
    "fc1": {"bias": torch.bfloat16, "rank": 16, "gelu": True},
    "fc2": {"bias": torch.float16, "rank": 32, "gate": torch.bfloat16, "residual": torch.bfloat16},
    "gate only": {"gate": torch.float32},
    "residual only": {"residual": torch.float32},
    "everything": {
        "bias": torch.float32,
        "rank": 16,
        "gelu": True,
        "gate": torch.float16,
        "residual": torch.float32,
    },
}


def operands(
    rows: int,
    outputs: int,
    width: int,
    device: torch.device,
    *,
    groups: int | None = None,
    bias: torch.dtype | None = None,
    rank: int = 0,
    up: torch.dtype = torch.bfloat16,
    branch: torch.dtype | None = None,
    gelu: bool = False,
    gate: torch.dtype | None = None,
    residual: torch.dtype | None = None,
    tokens_per_image: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Random codes over the whole int8 range, packed weights, and what an epilogue needs."""
    generator = torch.Generator().manual_seed(seed)
    g = () if groups is None else (groups,)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*g, *shape, generator=generator).to(device, dtype)

    codes = torch.randint(-128, 128, (*g, rows, width), generator=generator, dtype=torch.int8)
    weight = torch.randint(-1, 2, (*g, outputs, width), generator=generator, dtype=torch.int8)
    arguments: dict[str, Any] = {
        "token_scale": normal(rows).abs() / width**0.5 / 64,
        "token_offset": normal(rows) / width**0.5,
        "code_sums": codes.sum(-1, dtype=torch.int32).to(device),
        "channel_scale": normal(outputs).abs() + 0.1,
        "weight_sums": weight.sum(-1, dtype=torch.int32).to(device),
    }
    if bias is not None:
        arguments["bias"] = normal(outputs, dtype=bias)
    if rank:
        arguments["branch"] = normal(rows, rank, dtype=branch or up)
        arguments["up"] = normal(outputs, rank, dtype=up) / 4
    if gelu:
        arguments["gelu"] = True
    if gate is not None:
        arguments["gate"] = normal(rows // tokens_per_image, outputs, dtype=gate)
        arguments["tokens_per_image"] = tokens_per_image
    if residual is not None:
        arguments["residual"] = normal(rows, outputs, dtype=residual)
    return codes.to(device), pack_planes(weight).to(device), arguments


def integer_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Unit scales and no offset: float32 outputs are then the integer sums themselves."""
    return {
        "token_scale": torch.ones_like(arguments["token_scale"]),
        "token_offset": torch.zeros_like(arguments["token_offset"]),
        "code_sums": arguments["code_sums"],
        "channel_scale": torch.ones_like(arguments["channel_scale"]),
        "weight_sums": arguments["weight_sums"],
        "out_dtype": torch.float32,
    }


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert got.isfinite().all()
    error = (got.double() - want.double()).square().mean().sqrt()
    size = want.double().square().mean().sqrt()
    assert error <= (1e-6 if want.dtype == torch.float32 else 5e-3) * size
    if want.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(size))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_reference_is_a_linear_layer_of_dequantized_operands(epilogue: str) -> None:
    """Against float64: dense product of xhat = s c + o and a w, then the same epilogue."""
    cpu = torch.device("cpu")
    codes, planes, arguments = operands(
        12, 40, 200, cpu, tokens_per_image=4, seed=1, **EPILOGUES[epilogue]
    )
    weight = torch.randint(  # the weight that `operands` packed: its second draw
        -1, 2, (40, 200), generator=_after_codes(12, 200, seed=1), dtype=torch.int8
    )
    assert torch.equal(pack_planes(weight), planes)
    a = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    x = a["token_scale"][:, None] * codes.double() + a["token_offset"][:, None]
    y = x @ (a["channel_scale"][:, None] * weight.double()).T
    if "up" in a:
        y += a["branch"] @ a["up"].T
    if "bias" in a:
        y += a["bias"]
    if arguments.get("gelu"):
        y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    if "gate" in a:
        y *= torch.stack([a["gate"][t // 4] for t in range(12)])
    if "residual" in a:
        y += a["residual"]
    got = reference.ternary_matmul(codes, planes, **arguments, out_dtype=torch.float32)
    torch.testing.assert_close(got.double(), y, rtol=1e-5, atol=1e-5)
    rounded = reference.ternary_matmul(codes, planes, **arguments)
    assert torch.equal(rounded, got.bfloat16())


def _after_codes(rows: int, width: int, seed: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    torch.randint(-128, 128, (rows, width), generator=generator, dtype=torch.int8)
    return generator


def test_reference_refuses_widths_whose_float32_sums_may_round() -> None:
    width = reference.EXACT_WIDTH
    codes, planes = torch.zeros(1, width, dtype=torch.int8), torch.zeros(1, 1, dtype=torch.uint8)
    with pytest.raises(KernelInputError, match=f"K = {width} is not exact"):
        reference.integer_product(codes, planes)


def test_reference_is_exact_at_extreme_codes() -> None:
    width = 8192
    codes = torch.full((1, width), -128, dtype=torch.int8)
    planes = pack_planes(torch.ones(1, width, dtype=torch.int8))
    assert reference.integer_product(codes, planes).item() == -256 * width


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(variant: Variant, epilogue: str, device: torch.device) -> None:
    # 21 tokens of 7: images cross the 16-token blocks; 70 outputs and 208 columns are ragged.
    codes, planes, arguments = operands(
        21, 70, 208, device, tokens_per_image=7, **EPILOGUES[epilogue]
    )
    for out_dtype in (torch.float32, torch.bfloat16):
        arguments["out_dtype"] = out_dtype
        got = ternary_matmul(codes, planes, variant=variant, tile=SMALL[variant], **arguments)
        assert_close(got, reference.ternary_matmul(codes, planes, **arguments))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_image_per_block_of_tokens(variant: Variant, device: torch.device) -> None:
    """When blocks lie within an image the gate is one vector; M ends inside a block's image."""
    codes, planes, arguments = operands(
        64, 32, 128, device, gate=torch.float32, residual=torch.bfloat16, tokens_per_image=32
    )
    arguments["out_dtype"] = torch.float16
    got = ternary_matmul(codes, planes, variant=variant, tile=SMALL[variant], **arguments)
    assert_close(got, reference.ternary_matmul(codes, planes, **arguments))


@pytest.mark.parametrize(
    ("rows", "outputs", "width"),
    [
        (5, 384, 384),  # DiT-S proj
        (3, 384, 1536),  # DiT-S fc2
        (3, 768, 3072),  # DiT-B fc2
        (3, 1024, 1024),  # DiT-L proj
        (2, 640, 4096),  # DiT-L fc2, part of its outputs
        (4, 1152, 1152),  # DiT-XL proj
        (2, 1152, 4608),  # DiT-XL fc2
        (2, 3456, 1152),  # DiT-XL qkv
        (1, 1, 1),
        (17, 33, 129),
        (16, 32, 256),
    ],
)
def test_variants_have_the_same_integers(
    rows: int, outputs: int, width: int, device: torch.device
) -> None:
    codes, planes, arguments = operands(rows, outputs, width, device)
    exact = integer_arguments(arguments)
    want = reference.integer_product(codes, planes) - arguments["code_sums"][:, None]
    large = outputs > 128
    aligned = width % ALIGNED_WIDTH == 0
    for variant in VARIANTS if aligned else ("tile", "skinny"):
        tile = Tile(128, 16, 32, 4, 2, 2) if large else SMALL[variant]
        got = ternary_matmul(codes, planes, variant=variant, tile=tile, **exact)
        assert torch.equal(got, want.float()), variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_written_outside_the_output(
    variant: Variant, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every buffer a launcher allocates gets a margin on both sides, which must stay as it was."""
    codes, planes, arguments = operands(21, 70, 304, device)
    margin, buffers, empty = 8192, [], torch.empty

    def with_margins(*size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = size[0] if isinstance(size[0], tuple) else size
        count = torch.Size(shape).numel()
        buffer = empty(count + 2 * margin, dtype=dtype, device=device).zero_()
        buffers.append(buffer)
        return buffer[margin : margin + count].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", with_margins)
        ternary_matmul(codes, planes, variant=variant, tile=SMALL[variant], **arguments)
    assert len(buffers) == (1 if variant == "tile" else 2)
    for buffer in buffers:
        assert not buffer[:margin].any()
        assert not buffer[-margin:].any()
        assert buffer[margin:-margin].any()


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("step_bytes", [32, 64])
def test_splits_of_k_change_nothing(splits: int, step_bytes: int, device: torch.device) -> None:
    """Also where the last splits have no work: 512 columns are two or four steps."""
    codes, planes, arguments = operands(5, 40, 512, device, bias=torch.float32, rank=16)
    got = ternary_matmul(
        codes,
        planes,
        variant="skinny",
        tile=Tile(32, 16, step_bytes, 4, 2, splits),
        **arguments,
        out_dtype=torch.float32,
    )
    assert_close(got, reference.ternary_matmul(codes, planes, **arguments, out_dtype=torch.float32))


@pytest.mark.parametrize("splits", [1, 3])
def test_groups(splits: int, device: torch.device) -> None:
    codes, planes, arguments = operands(18, 70, 384, device, groups=3, bias=torch.bfloat16, rank=16)
    tile = Tile(32, 16, 32, 4, 2, splits)
    got = grouped_ternary_matmul(codes, planes, tile=tile, **arguments)
    assert_close(got, reference.grouped_ternary_matmul(codes, planes, **arguments))
    for g in range(3):
        one = {name: value[g] for name, value in arguments.items()}
        assert torch.equal(
            got[g], ternary_matmul(codes[g], planes[g], variant="skinny", tile=tile, **one)
        )


@pytest.mark.parametrize("processors", [1, 3])
def test_programs_that_stay_take_every_block(
    processors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine blocks for two or six programs: some take one more than others."""
    monkeypatch.setattr(launchers, "_processors", lambda device: processors)
    codes, planes, arguments = operands(40, 70, 272, device, residual=torch.float32)
    arguments["out_dtype"] = torch.float32
    got = ternary_matmul(codes, planes, variant="scratch", tile=SMALL["scratch"], **arguments)
    assert_close(got, reference.ternary_matmul(codes, planes, **arguments))


def test_default_tiles_of_every_variant(device: torch.device) -> None:
    """Blocks of 128 tokens, whose epilogue goes by 64 and ends inside the first half."""
    codes, planes, arguments = operands(
        190, 136, 384, device, rank=8, gate=torch.float32, tokens_per_image=95
    )
    arguments["out_dtype"] = torch.float32
    want = reference.ternary_matmul(codes, planes, **arguments)
    for variant in (None, *VARIANTS):
        assert_close(ternary_matmul(codes, planes, variant=variant, **arguments), want)


def test_default_groups(device: torch.device) -> None:
    codes, planes, arguments = operands(3, 96, 128, device, groups=2)
    assert_close(
        grouped_ternary_matmul(codes, planes, **arguments),
        reference.grouped_ternary_matmul(codes, planes, **arguments),
    )


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 70),
    width=st.integers(1, 300),
    variant=st.sampled_from(VARIANTS),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    rows: int, outputs: int, width: int, variant: Variant, seed: int, device: torch.device
) -> None:
    if variant == "scratch":
        width = -(-width // ALIGNED_WIDTH) * ALIGNED_WIDTH
    codes, planes, arguments = operands(
        rows, outputs, width, device, residual=torch.float32, seed=seed
    )
    arguments["out_dtype"] = torch.float32
    got = ternary_matmul(codes, planes, variant=variant, tile=SMALL[variant], **arguments)
    assert_close(got, reference.ternary_matmul(codes, planes, **arguments))


def test_branch_is_rounded_to_the_dtype_of_up(device: torch.device) -> None:
    # The interpreter cuts float32 to bfloat16 instead of rounding it; float16 it rounds.
    codes, planes, arguments = operands(
        4, 32, 64, device, rank=8, up=torch.float16, branch=torch.float32
    )
    arguments["out_dtype"] = torch.float32
    rounded = arguments | {"branch": arguments["branch"].half()}
    for product in (ternary_matmul, reference.ternary_matmul):
        got = product(codes, planes, **arguments)
        assert torch.equal(got, product(codes, planes, **rounded))


def test_gelu_of_extreme_values_is_finite(device: torch.device) -> None:
    codes, planes, arguments = operands(4, 32, 64, device, gelu=True)
    arguments |= {
        "token_scale": torch.full((4,), 1e4, device=device),
        "out_dtype": torch.float32,
    }
    assert_close(
        ternary_matmul(codes, planes, variant="tile", tile=SMALL["tile"], **arguments),
        reference.ternary_matmul(codes, planes, **arguments),
    )


@pytest.mark.parametrize(("rows", "outputs"), [(0, 8), (8, 0), (0, 0)])
def test_empty(rows: int, outputs: int, device: torch.device) -> None:
    codes, planes, arguments = operands(rows, outputs, 64, device, bias=torch.float32)
    for product in (ternary_matmul, reference.ternary_matmul):
        got = product(codes, planes, **arguments)
        assert got.shape == (rows, outputs)
        assert got.dtype == torch.bfloat16
    codes, planes, arguments = operands(rows, outputs, 64, device, groups=2)
    assert grouped_ternary_matmul(codes, planes, **arguments).shape == (2, rows, outputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 64)}, "codes must be int8"),
        ({"codes": torch.zeros(64, 4, dtype=torch.int8).T}, "codes must be contiguous"),
        ({"codes": torch.zeros(4, 0, dtype=torch.int8)}, "at least one column"),
        ({"codes": torch.zeros(4, 129, dtype=torch.int8)}, r"planes must be \[any, 64\]"),
        ({"planes": torch.zeros(8, 32, dtype=torch.int8)}, "planes must be uint8"),
        ({"planes": torch.zeros(8, 64, dtype=torch.uint8)[:, ::2]}, "planes must be contiguous"),
        ({"token_scale": torch.zeros(5)}, r"token_scale must be \[4\]"),
        ({"token_offset": torch.zeros(4).double()}, "token_offset must be float32"),
        ({"code_sums": torch.zeros(4)}, "code_sums must be int32"),
        ({"channel_scale": torch.zeros(16)[::2]}, "channel_scale must be contiguous"),
        ({"weight_sums": torch.zeros(8, dtype=torch.int64)}, "weight_sums must be int32"),
        ({"bias": torch.zeros(8, dtype=torch.int32)}, "bias must be float32, bfloat16, float16"),
        ({"branch": torch.zeros(4, 2)}, "given together"),
        ({"up": torch.zeros(8, 2)}, "given together"),
        ({"branch": torch.zeros(4, 3), "up": torch.zeros(8, 2)}, r"branch must be \[4, 2\]"),
        ({"branch": torch.zeros(4, 0), "up": torch.zeros(8, 0)}, "rank 0"),
        ({"gate": torch.zeros(4, 8), "tokens_per_image": 2}, r"gate must be \[2, 8\]"),
        ({"gate": torch.zeros(1, 8), "tokens_per_image": 3}, "no multiple"),
        ({"gate": torch.zeros(1, 8), "tokens_per_image": 0}, "no multiple"),
        ({"residual": torch.zeros(8, 4).T}, "residual must be contiguous"),
        ({"out_dtype": torch.float64}, "out_dtype must be"),
        ({"bias": torch.zeros(8, device="meta")}, "bias is on meta"),
    ],
)
def test_wrong_inputs_say_what_is_supported(change: dict[str, Any], message: str) -> None:
    cpu = torch.device("cpu")
    codes, planes, arguments = operands(4, 8, 64, cpu)
    given_arguments = {"codes": codes, "planes": planes} | arguments | change
    products = [reference.ternary_matmul] + ([ternary_matmul] if INTERPRETED else [])
    for product in products:
        with pytest.raises(KernelInputError, match=message):
            product(**given_arguments)


def test_groups_of_different_number_are_refused(device: torch.device) -> None:
    codes, planes, arguments = operands(4, 8, 64, device, groups=3)
    arguments["token_scale"] = arguments["token_scale"][:2]
    for product in (grouped_ternary_matmul, reference.grouped_ternary_matmul):
        with pytest.raises(KernelInputError, match=r"token_scale must be \[3, 4\]"):
            product(codes, planes, **arguments)


def test_unknown_variant_and_overflowing_width(device: torch.device) -> None:
    codes, planes, arguments = operands(4, 8, 64, device)
    with pytest.raises(KernelInputError, match="tile, skinny, scratch"):
        ternary_matmul(codes, planes, variant="dense", **arguments)  # type: ignore[arg-type]
    codes, planes, arguments = operands(4, 8, 65, device)
    with pytest.raises(KernelInputError, match=r"multiple of 16 bytes .* K is 65"):
        ternary_matmul(codes, planes, variant="scratch", **arguments)
    wide = torch.empty(0, 2**23, dtype=torch.int8, device=device)
    with pytest.raises(KernelInputError, match="overflows int32 sums; K < 8388608"):
        ternary_matmul(wide, planes, **arguments)


@pytest.mark.parametrize("groups", [None, 2])
def test_inside_tuning_a_new_shape_is_timed(
    groups: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, planes, arguments = operands(4, 8, 64, device, groups=groups, rank=3)
    product: Any = ternary_matmul if groups is None else grouped_ternary_matmul
    chosen: dict[str, Any] = {"tile": SMALL["skinny"]}
    chosen |= {"variant": "skinny"} if groups is None else {}
    timed: list[int] = []

    def first_tile(codes: Tensor, planes: Tensor, **found: Any) -> tuple[Variant, Tile]:
        timed.append(len(codes))
        product(codes, planes, **chosen, **found)
        return "skinny", SMALL["skinny"]

    monkeypatch.setattr("kernels.ternary_matmul.triton.autotune", first_tile)
    want = product(codes, planes, **arguments)
    assert not timed
    with tuning():
        assert_close(product(codes, planes, **arguments), want)
        assert len(timed) == 1
        product(codes, planes, **chosen, **arguments)
    product(codes, planes, **arguments)
    assert len(timed) == 1


@pytest.mark.skipif(not INTERPRETED, reason="says what happens without a device")
def test_autotune_needs_a_device(device: torch.device) -> None:
    codes, planes, arguments = operands(4, 8, 64, device)
    with pytest.raises(KernelInputError, match="needs a CUDA device"):
        autotune(codes, planes, **arguments)


@pytest.mark.parametrize(
    ("rows", "outputs", "width", "variant"),
    [
        (2, 6912, 1152, "skinny"),
        (128, 6912, 1152, "skinny"),
        (256, 1152, 4608, "skinny"),
        (512, 1152, 4608, "skinny"),
        (512, 4608, 1152, "tile"),
        (2048, 4608, 1152, "tile"),
        (4096, 1152, 4608, "scratch"),  # unpacked once, to memory
        (32768, 4608, 1152, "scratch"),
        (32768, 4608, 1150, "tile"),  # whose rows tensor copies do not take
    ],
)
def test_variant_of_a_shape(rows: int, outputs: int, width: int, variant: Variant) -> None:
    assert choose_variant(rows, outputs, width) == variant
    tile = default_tile(variant, rows, outputs, width)
    assert tile == default_tile(variant, rows, outputs, width)
    timed = candidates(rows, outputs, width)
    assert variant in {name for name, _ in timed}
    assert len(timed) <= 24
    assert all(tile in TILES[name] for name, tile in timed)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "outputs", "width", "epilogue"),
    [
        (2048, 4608, 1152, "fc1"),
        (2048, 1152, 4608, "fc2"),
        (300, 3456, 1152, "low rank"),
        (64, 6912, 1152, "low rank"),
        (257, 1024, 4096, "fc2"),
    ],
)
def test_every_listed_tile_on_the_device(
    rows: int, outputs: int, width: int, epilogue: str, device: torch.device
) -> None:
    """The machine's unpacking against the reference, for everything `autotune` may choose."""
    images = {"tokens_per_image": 256 if rows % 256 == 0 else 1}
    codes, planes, arguments = operands(
        rows, outputs, width, device, **images, **EPILOGUES[epilogue]
    )
    exact = integer_arguments(arguments)
    sums = (reference.integer_product(codes, planes) - arguments["code_sums"][:, None]).float()
    want = reference.ternary_matmul(codes, planes, **arguments)
    for variant, tile in candidates(rows, outputs, width):
        got = ternary_matmul(codes, planes, variant=variant, tile=tile, **exact)
        assert torch.equal(got, sums), (variant, tile)
        assert_close(ternary_matmul(codes, planes, variant=variant, tile=tile, **arguments), want)


@pytest.mark.gpu
def test_capture_and_autotune_on_the_device(device: torch.device) -> None:
    codes, planes, arguments = operands(512, 1152, 1152, device, bias=torch.bfloat16)
    variant, tile = autotune(codes, planes, **arguments)
    assert (variant, tile) in candidates(512, 1152, 1152)
    want = ternary_matmul(codes, planes, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ternary_matmul(codes, planes, **arguments)
    got.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got, want)
    assert set(VECTORS) <= set(arguments)
