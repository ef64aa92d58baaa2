"""What happens around sampling: shards of seeds, PNG grids, decoding of latents."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError
from robuq_bench.judging.sampling import decode_latents, image_grid, shard


@given(length=st.integers(0, 60), count=st.integers(1, 70))
def test_shards_partition_in_order(length: int, count: int) -> None:
    items = list(range(length))
    parts = [shard(items, f"{i}/{count}") for i in range(1, count + 1)]
    assert [item for part in parts for item in part] == items
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("part", ["", "1", "0/4", "5/4", "a/4", "1/0", "-1/4", "1/4/2", "1.5/4"])
def test_malformed_shards_are_refused(part: str) -> None:
    with pytest.raises(UsageError, match="1 <= i <= n"):
        shard([1, 2], part)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_enlarged_images_row_by_row(channels: int) -> None:
    images = torch.randint(
        256, (5, channels, 2, 3), generator=torch.Generator().manual_seed(0)
    ).byte()
    png = image_grid(images, columns=2, scale=3)
    assert png == image_grid(images.clone(), columns=2, scale=3)
    with Image.open(io.BytesIO(png)) as grid:
        assert grid.size == (2 * 9 + 2, 3 * 6 + 2 * 2)
        for index, image in enumerate(images):
            row, column = divmod(index, 2)
            for y in range(6):
                for x in range(9):
                    pixel = grid.getpixel((column * 11 + x, row * 8 + y))
                    expected = tuple(image[:, y // 3, x // 3].tolist())
                    assert (pixel if channels == 3 else (pixel,)) == expected
        blank = grid.getpixel((11, 16))
        assert blank == ((255, 255, 255) if channels == 3 else 255)


def test_grid_is_no_wider_than_its_images() -> None:
    with Image.open(io.BytesIO(image_grid(torch.zeros(2, 1, 4, 4).byte(), columns=10))) as grid:
        assert grid.size == (10, 4)


@pytest.mark.parametrize(
    ("images", "columns", "scale"),
    [
        (torch.zeros(2, 1, 4, 4), 2, 1),
        (torch.zeros(2, 4, 4, 4).byte(), 2, 1),
        (torch.zeros(2, 4, 4).byte(), 2, 1),
        (torch.zeros(0, 1, 4, 4).byte(), 2, 1),
        (torch.zeros(2, 1, 4, 4).byte(), 0, 1),
        (torch.zeros(2, 1, 4, 4).byte(), 2, 0),
    ],
)
def test_impossible_grids_are_refused(images: Tensor, columns: int, scale: int) -> None:
    with pytest.raises(UsageError, match="a grid needs"):
        image_grid(images, columns, scale)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from robuq_bench._compat import import_torchvision

    import_torchvision()
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, scaling_factor=0.5
    ).save_pretrained(folder)
    return folder


def test_latents_are_decoded_by_a_local_vae(vae_folder: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    images = decode_latents(latents, vae_folder, batch_size=2)
    vae = AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False)
    with torch.no_grad():
        pixels = vae.decode(latents / 0.5).sample
    expected = (127.5 * pixels + 128).clamp(0, 255).floor()
    assert images.dtype == torch.uint8
    assert images.shape == (3, 3, 8, 8)
    assert (images.float() - expected).abs().max() <= 1
    assert images.float().std() > 1


@pytest.mark.parametrize("given_path", [None, "", "no-such-folder"])
def test_missing_vae_is_named(given_path: str | None, tmp_path: Path) -> None:
    path = tmp_path / given_path if given_path else given_path
    with pytest.raises(MissingResourceError, match=str(path) if path else "no path"):
        decode_latents(torch.zeros(1, 4, 8, 8), path)


def test_damaged_vae_is_named(vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((vae_folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        decode_latents(torch.zeros(1, 4, 8, 8), tmp_path)
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).write_bytes((vae_folder / weights).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        decode_latents(torch.zeros(1, 4, 8, 8), tmp_path)


def changed_vae(vae_folder: Path, folder: Path, **config: Any) -> Path:
    """A copy of the VAE with other settings in its config.json."""
    settings = json.loads((vae_folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    weights = "diffusion_pytorch_model.safetensors"
    (folder / weights).write_bytes((vae_folder / weights).read_bytes())
    return folder


def test_a_vae_with_a_shift_is_decoded_with_it(vae_folder: Path, tmp_path: Path) -> None:
    """Stable Diffusion 3 and Flux encode latents = (z - shift) * factor."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    shifted = changed_vae(vae_folder, tmp_path, shift_factor=0.7)
    expected = decode_latents(latents + 0.7 * 0.5, vae_folder)
    images = decode_latents(latents, shifted)
    assert (images.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(images, decode_latents(latents, vae_folder))


def test_a_vae_that_cannot_decode_is_refused_by_name(vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"vae.* latents of 4 channels, these have 16"):
        decode_latents(torch.zeros(1, 16, 8, 8), vae_folder)
    for config in ({"latent_channels": "four"}, {"block_out_channels": None}, {"act_fn": "no"}):
        with pytest.raises(CheckpointError, match=f"{tmp_path} holds no readable"):
            decode_latents(torch.zeros(1, 4, 8, 8), changed_vae(vae_folder, tmp_path, **config))
    folder = changed_vae(vae_folder, tmp_path)
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.conv_in.bias"][0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.bias is not finite"):
        decode_latents(torch.zeros(1, 4, 8, 8), folder)
