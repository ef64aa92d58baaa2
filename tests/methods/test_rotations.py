"""Scalings and rotations: they cancel, they are orthogonal, and they are what they say.

Every name that a plan may give is run. One whose parameters have no default, or that refuses a
width, stands in a table here; a new method that needs either fails until it does.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.methods import Method, RotationMethod, Slot, method_names, read_method
from robuq_bench.methods.rotations.dual_rotation import fit_dual_rotation
from robuq_bench.methods.site import Site

WIDTHS = (1, 16, 131, 144, 576, 1152, 4608)
WIDTHS_TO_INVERT = tuple(n for n in WIDTHS if n <= 1152)
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "block-hadamard": [{"block": 16}, {"block": 36, "signs": True}, {"block": 128, "signs": True}],
    "dual-rotation": [{}, {"block": 12, "steps": 3}],
    "smooth": [{}, {"alpha": 0.0}, {"alpha": 1.0}],
}
REFUSED = {
    ("hadamard", 131),
    ("randomized-hadamard", 131),
    *(("block-hadamard 16", n) for n in (1, 131)),
    *(("block-hadamard 36", n) for n in (1, 16, 131)),
    *(("block-hadamard 128", n) for n in (1, 16, 131, 144, 576)),
    ("dual-rotation", 131),
    *(("dual-rotation 12", n) for n in (1, 16, 131)),
}
CASES = [
    (slot, name, values)
    for slot in ("scaling", "rotation")
    for name in method_names(slot)  # type: ignore[arg-type]
    for values in VARIANTS.get(name, [{}])
]


def seen(n: int, name: str = "blocks.0.mlp.fc1", seed: int = 0) -> Site:
    """A site that saw 48 tokens with a few loud channels and one that was always zero."""
    tokens = torch.randn((48, n), generator=torch.Generator().manual_seed(1))
    tokens[:, : n // 20] *= 30
    tokens[:, n // 2 : n // 2 + 1] = 0
    x = tokens.double()
    return Site(name, seed, tokens, tokens.abs().amax(0), x.T @ x if n < 600 else None, len(x))


def weight(n: int, out: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn((out, n), generator=generator, dtype=torch.float64)


def method(slot: Slot, name: str, values: dict[str, Any]) -> Method:
    found = read_method(slot, {"method": name, **values})
    assert found is not None
    return found


def label(name: str, values: dict[str, Any]) -> str:
    return f"{name} {values['block']}" if "block" in values else name


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize(("slot", "name", "values"), CASES)
def test_the_product_stays(slot: Slot, name: str, values: dict[str, Any], n: int) -> None:
    """W' x' = W x for other tokens than the fitted ones; a rotation keeps their inner products."""
    chosen = method(slot, name, values)
    if (label(name, values), n) in REFUSED:
        with pytest.raises(ConfigError):
            chosen.check(24, n)
        return
    chosen.check(24, n)
    w, site = weight(n), seen(n)
    module: Any = chosen.fit(w, site)
    x = torch.randn((3, 5, n), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    product, expected = module(x) @ module.weight(w).T, x @ w.T
    assert (product - expected).norm() <= 1e-6 * expected.norm()
    assert module(x).shape == x.shape
    assert module(x).dtype == module.weight(w).dtype == torch.float64
    assert module(torch.zeros(2, n)).eq(0).all()
    float32 = copy.deepcopy(module).float()
    single = float32(x.float()) @ float32.weight(w.float()).T
    assert single.dtype == torch.float32
    assert (single - expected).norm() <= 1e-5 * expected.norm()
    if slot == "rotation":
        flat = x.view(15, n)
        gram = module(flat) @ module(flat).T
        assert (gram - flat @ flat.T).norm() <= 1e-10 * gram.norm()


@pytest.mark.parametrize("n", WIDTHS_TO_INVERT)
@pytest.mark.parametrize(
    ("name", "values"), [(name, values) for slot, name, values in CASES if slot == "rotation"]
)
def test_orthogonal(name: str, values: dict[str, Any], n: int) -> None:
    chosen = method("rotation", name, values)
    if (label(name, values), n) in REFUSED:
        with pytest.raises(ConfigError):
            chosen.check(24, n)
        return
    eye = torch.eye(n, dtype=torch.float64)
    R = chosen.fit(weight(n), seen(n))(eye)
    torch.testing.assert_close(R @ R.T, eye, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("slot", "name", "values"), CASES)
def test_fitted_values_load_into_a_blank_site(
    slot: Slot, name: str, values: dict[str, Any]
) -> None:
    n = 576 if values.get("block") != 128 else 384
    chosen, w = method(slot, name, values), weight(n)
    fitted: Any = chosen.fit(w, seen(n, seed=7))
    blank: Any = chosen.fit(w, Site.blank("blocks.0.mlp.fc1", n, seed=7))
    blank.load_state_dict(fitted.state_dict())
    assert torch.equal(blank(w), fitted(w))
    assert torch.equal(blank.weight(w), fitted.weight(w))
    bits = chosen.stored_bits(n)  # type: ignore[attr-defined]
    assert bits >= 0
    if isinstance(chosen, RotationMethod):
        assert 0 < chosen.additions(n) + chosen.macs(n) <= 2 * n * n


@pytest.mark.parametrize(("slot", "name", "values"), CASES)
def test_gradients_pass(slot: Slot, name: str, values: dict[str, Any]) -> None:
    """Both maps are linear, so that their gradients are those of torch's finite differences."""
    n = 144 if values.get("block") != 128 else 128
    module: Any = method(slot, name, values).fit(weight(n), seen(n))
    x = weight(n, 2).requires_grad_()
    for function in (module.forward, module.weight):
        assert torch.autograd.gradcheck(function, (x,), fast_mode=True)


@pytest.mark.parametrize(("slot", "name", "values"), CASES)
def test_what_was_seen_goes_through(slot: Slot, name: str, values: dict[str, Any]) -> None:
    """Tokens, their largest magnitudes and their Gram matrix stay those of one set of inputs."""
    n = 144 if values.get("block") != 128 else 256
    site = seen(n)
    module = method(slot, name, values).fit(weight(n), site)
    after = site.through(module, diagonal=slot == "scaling")
    assert after.tokens is not None
    assert after.absmax is not None
    assert after.gram is not None
    assert site.tokens is not None
    expected = module(site.tokens.double())
    torch.testing.assert_close(after.tokens.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.absmax, after.tokens.abs().amax(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(after.gram, expected.T @ expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(("block", "n"), [(2, 8), (16, 144), (64, 576), (128, 1152)])
def test_block_hadamard_is_scipys(block: int, n: int) -> None:
    module = method("rotation", "block-hadamard", {"block": block}).fit(weight(n), seen(n))
    dense = scipy.linalg.block_diag(*[scipy.linalg.hadamard(block)] * (n // block)) / block**0.5
    np.testing.assert_allclose(module(weight(n)).numpy(), weight(n).numpy() @ dense, atol=1e-12)
    assert not module.state_dict()


def test_signs_of_a_block_hadamard_are_the_layers() -> None:
    """Bits of SHAKE-256 of "seed:name", lowest first, as every random sign of the suite."""
    chosen = method("rotation", "block-hadamard", {"block": 16, "signs": True})
    signed: Any = chosen.fit(weight(144), seen(144, "a.b", 3))
    stream = np.frombuffer(hashlib.shake_256(b"3:a.b").digest(18), dtype=np.uint8)
    expected = 1 - 2 * np.unpackbits(stream, bitorder="little").astype(float)
    assert signed.signs.tolist() == expected.tolist()
    plain: nn.Module = method("rotation", "block-hadamard", {"block": 16}).fit(
        weight(144), seen(144)
    )
    torch.testing.assert_close(signed(weight(144)), plain(weight(144) * signed.signs))
    assert chosen.stored_bits(144) == 144  # type: ignore[attr-defined]


def test_block_hadamard_accounts_and_refusals() -> None:
    chosen: Any = method("rotation", "block-hadamard", {"block": 36})
    assert chosen.stored_bits(144) == 0
    assert chosen.additions(144) == 144 * 36
    # 128 is applied as two factors, of 8 and 16.
    wide: Any = method("rotation", "block-hadamard", {"block": 128})
    assert wide.additions(1152) == 1152 * (8 + 16)
    with pytest.raises(ConfigError, match="block = 36 does not divide the width 100"):
        chosen.check(4, 100)
    with pytest.raises(ConfigError, match=r"block = 6: .* 4 and 8"):
        method("rotation", "block-hadamard", {"block": 6}).check(4, 12)
    with pytest.raises(ValueError, match="block"):
        method("rotation", "block-hadamard", {})


def test_dual_rotation_spreads_an_isolated_outlier() -> None:
    """One entry a in an otherwise silent layer: the first rotation alone makes it a/sqrt(B)."""
    tokens = torch.zeros(8, 64)
    tokens[3, 21] = 50
    chosen = method("rotation", "dual-rotation", {"block": 16, "steps": 1})
    module: Any = chosen.fit(weight(64), Site("x", 0, tokens))
    once = tokens[3, 16:32].double() @ module.first[1]
    torch.testing.assert_close(once, torch.full((16,), 50 / 4.0, dtype=torch.float64))
    # Its 16 parts then lie four to a block, where no range becomes larger.
    twice = module(tokens)
    assert twice.max() - twice.min() <= 12.5 + 1e-5
    assert (twice[3].view(4, 16).norm(dim=1) - 25).abs().max() < 1e-4


def test_dual_rotation_is_the_fit_with_the_sites_seed() -> None:
    site = seen(144, "a.b", 5)
    chosen: Any = method("rotation", "dual-rotation", {"block": 24, "steps": 9})
    module = chosen.fit(weight(144), site)
    assert site.tokens is not None
    seed = int.from_bytes(hashlib.shake_256(b"5:a.b").digest(7), "big")
    by_hand = fit_dual_rotation(site.tokens, 24, 9, seed)
    torch.testing.assert_close(
        module(weight(144)), weight(144) @ by_hand.matrix(), rtol=0, atol=1e-12
    )
    again, other = (chosen.fit(weight(144), seen(144, name, 5)) for name in ("a.b", "a.c"))
    assert torch.equal(module.first, again.first)
    assert not torch.equal(module.first, other.first)
    assert chosen.fit(weight(144).float(), site).second.dtype == torch.float32


def test_dual_rotation_accounts() -> None:
    """Two sets of n/B blocks of B x B in fp16; 11 bits tell 1152 channels apart, 7 bits 128."""
    chosen: Any = method("rotation", "dual-rotation", {})
    assert chosen.stored_bits(1152) == 2 * 9 * 128 * 128 * 16 + 1152 * 11
    assert chosen.stored_bits(128) == 2 * 128 * 128 * 16 + 128 * 7
    assert chosen.additions(1152) == 0
    assert chosen.macs(1152) == 2 * 9 * 128 * 128
    small: Any = method("rotation", "dual-rotation", {"block": 12})
    assert small.stored_bits(144) == 2 * 12 * 12 * 12 * 16 + 144 * 8


def test_dual_rotation_refusals() -> None:
    chosen = method("rotation", "dual-rotation", {})
    with pytest.raises(ConfigError, match="width 131"):
        chosen.check(4, 131)
    with pytest.raises(ConfigError, match="block size 5 does not divide the width 12"):
        method("rotation", "dual-rotation", {"block": 5}).check(4, 12)
    with pytest.raises(UsageError, match=r"'a.b'.*tokens"):
        chosen.fit(weight(12), Site("a.b"))
    with pytest.raises(UsageError, match=r"'a.b'.*not all finite"):
        chosen.fit(weight(12), Site("a.b", 0, torch.full((2, 12), float("nan"))))
    with pytest.raises(UsageError, match=r"'a.b'.*empty"):
        chosen.fit(weight(12), Site("a.b", 0, torch.ones(0, 12)))
