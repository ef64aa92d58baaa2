"""Sampling with one seed per image, so that a sample set does not depend on how it is cut up.

Image i takes its starting noise and its ancestral noise from its own CPU generator, seeded with
seed i: batch size, order, shard and device change no random number (habit of NVlabs/edm2).
Matrix products round differently in batches of another size. In full precision that moves a
pixel by one level at most; in a quantized model a last bit can flip an activation code, and some
pixels move by more. Batches of equal content give equal bits.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from robuq_bench._compat import import_torchvision
from robuq_bench.data.datasets import to_uint8
from robuq_bench.diffusion import Diffusion, make_scheduler
from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError
from robuq_bench.files import expand_user
from robuq_bench.quantization.linear import cached_weights
from robuq_bench.sections import check_shard
from robuq_bench.threads import run_side_by_side

T = TypeVar("T")
Progress = Callable[[int, int], None]
VAE_BATCH_SIZE = 8
GRID_GAP_PIXELS = 2


def sample_images(
    model: nn.Module,
    workload: Any,
    *,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    workers: int = 1,
) -> Tensor:
    """Sample one image per seed by the workload's evaluation protocol.

    Args:
        model: a DiT or its quantized copy; moved to `device`, its train/eval modes are restored.
        workload: its model, data, diffusion and evaluation sections are read.
        seeds: one per image; the same seed and label give the same noise anywhere.
        labels: int64 [N] classes; default seed % num_classes.
        batch_size: images per batch; default evaluation.batch_size.
        progress: called after every step as progress(images_done, images_total), where the
            images of batches under way count pro rata.
        workers: batches at a time on a CPU, each on its share of torch's threads, see
            `run_side_by_side`; the model's forward pass must allow it.

    Returns:
        uint8 [N, C, H, W] in seed order; for latent workloads float32 latents (`decode_latents`).

    Raises:
        UsageError: labels that do not fit the seeds or classes, or an impossible protocol.
    """
    values = sample_values(
        model,
        workload,
        seeds=seeds,
        labels=labels,
        batch_size=batch_size,
        device=device,
        progress=progress,
        workers=workers,
    )
    return values if workload.data.source == "latents" else to_uint8(values)


def sample_values(
    model: nn.Module,
    workload: Any,
    *,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    workers: int = 1,
) -> Tensor:
    """Like `sample_images`, before the mapping to pixels: float32 [N, C, H, W] on the CPU."""
    evaluation, section = workload.evaluation, workload.model
    labels = default_labels(seeds, section.num_classes) if labels is None else labels
    _check_labels(labels, len(seeds), section.num_classes)
    batch_size = evaluation.batch_size if batch_size is None else batch_size
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    diffusion = Diffusion.from_config(workload.diffusion)
    steps = evaluation.sampling_steps
    scheduler = make_scheduler(
        diffusion, evaluation.sampler, steps, section.learn_sigma, evaluation.timestep_spacing
    )
    values = torch.empty(len(seeds), section.in_channels, section.input_size, section.input_size)
    starts = range(0, len(seeds), batch_size)
    images_done = dict.fromkeys(starts, 0)
    lock = threading.Lock()

    def sample_batch(start: int) -> Iterator[None]:
        batch = slice(start, min(start + batch_size, len(seeds)))
        generators = [seed_generator(seed) for seed in seeds[batch]]
        x = initial_noise(generators, tuple(values.shape[1:])).to(device)
        y = labels[batch].to(device)
        for done, t in enumerate(scheduler.timesteps, start=1):
            output = _predict(model, x, t, y, evaluation.cfg_scale)
            x = _step(scheduler, evaluation.sampler, output, t, x, generators)
            if progress is not None:
                with lock:
                    images_done[start] = done * len(generators) // steps
                    progress(sum(images_done.values()), len(seeds))
            yield
        values[batch] = x.cpu()

    model.to(device)
    with evaluation_mode(model):
        run_side_by_side(sample_batch, starts, workers if torch.device(device).type == "cpu" else 1)
    return values


def default_labels(seeds: Sequence[int], num_classes: int) -> Tensor:
    """Return int64 [N] classes seed % num_classes: balanced over any run of consecutive seeds."""
    return torch.tensor([seed % num_classes for seed in seeds], dtype=torch.int64)


def seed_generator(seed: int) -> torch.Generator:
    """Return one image's CPU generator; it yields the starting noise, then each step's noise."""
    return torch.Generator().manual_seed(seed)


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Return standard normal x_T float32 [N, *shape], row i from generator i."""
    if not generators:
        return torch.empty(0, *shape)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, its ternary weights cached; then give each its mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with cached_weights(model):
            yield
    finally:
        for module in training:
            module.training = True


def _predict(model: Any, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
    """Model output [B, C or 2C, H, W], guided unless cfg_scale is 1."""
    if cfg_scale == 1:
        return model(x, t.to(x.device).expand(len(x)), y)
    null = torch.full_like(y, model.null_label)
    output = model.forward_with_cfg(
        torch.cat([x, x]), t.to(x.device).expand(2 * len(x)), torch.cat([y, null]), cfg_scale
    )
    return output[: len(x)]


def _step(
    scheduler: Any, sampler: str, output: Tensor, t: Tensor, x: Tensor, generators: list[Any]
) -> Tensor:
    output = output.to(x.dtype)
    if sampler == "ddim":
        # Deterministic DDIM has no use for the variance channels and rejects them.
        return scheduler.step(output[:, : x.shape[1]], t, x, return_dict=False)[0]
    return scheduler.step(output, t, x, generator=generators, return_dict=False)[0]


def _check_labels(labels: Tensor, count: int, num_classes: int) -> None:
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise UsageError(
            f"labels must be int64 of shape ({count},), one per seed; "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if count and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise UsageError(
            f"labels must be in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}"
        )


def shard(items: Sequence[T], part: str) -> Sequence[T]:
    """Return part 'i/n' (i from 1 to n) of a sequence.

    Parts are contiguous, in order and differ in length by at most one, so that concatenating
    1/n ... n/n gives the sequence back. UsageError for anything else.
    """
    try:
        check_shard(part)
    except ValueError as error:
        raise UsageError(str(error)) from None
    i, n = map(int, part.split("/"))
    return items[(i - 1) * len(items) // n : i * len(items) // n]


def decode_latents(
    latents: Tensor,
    vae_path: str | Path | None,
    *,
    batch_size: int = VAE_BATCH_SIZE,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Decode VAE-scaled latents float [N, 4, h, w] to uint8 [N, 3, 8h, 8w].

    vae_path is a local folder that diffusers' AutoencoderKL.save_pretrained wrote, such as a copy
    of stabilityai/sd-vae-ft-ema; nothing is downloaded. Latents are divided by the VAE's own
    scaling factor (0.18215 for Stable Diffusion 1) and shifted where it has a shift.

    Raises MissingResourceError when the folder is absent, CheckpointError when it is no such VAE,
    UsageError when its latents have another number of channels.
    """
    folder = expand_user(vae_path) if vae_path else None
    if folder is None or not (folder / "config.json").is_file():
        raise MissingResourceError(
            f"latents need a VAE to become images, but {folder or 'no path'} is not a folder with "
            "an AutoencoderKL (config.json and weights); download stabilityai/sd-vae-ft-ema "
            "and give its path"
        )
    # diffusers' models import torchvision, which needs help beside a CPU-only torch.
    import_torchvision()
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    try:
        vae: Any = AutoencoderKL.from_pretrained(
            str(folder), local_files_only=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # what diffusers raises depends on what is damaged
        raise CheckpointError(f"{folder} holds no readable AutoencoderKL: {error}") from error
    broken = [name for name, value in vae.named_parameters() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"{folder}: {broken[0]} is not finite; copy the VAE anew")
    if vae.config.latent_channels != latents.shape[1]:
        raise UsageError(
            f"the VAE in {folder} has latents of {vae.config.latent_channels} channels, these have "
            f"{latents.shape[1]}; give the VAE that they were encoded with"
        )
    vae.to(device).eval()
    shift = vae.config.shift_factor or 0.0
    images = []
    with torch.inference_mode():
        for start in range(0, len(latents), batch_size):
            part = latents[start : start + batch_size].to(device).float()
            scaled = part / vae.config.scaling_factor + shift
            images.append(to_uint8(vae.decode(scaled, return_dict=False)[0]).cpu())
    return torch.cat(images)


def image_grid(images: Tensor, columns: int, scale: int = 1) -> bytes:
    """Tile uint8 [N, 1 or 3, H, W] row by row into a PNG, each pixel enlarged `scale` times.

    Enlargement is nearest-neighbour; equal images give equal bytes.
    """
    from PIL import Image

    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise UsageError(
            f"a grid needs uint8 images [N, 1 or 3, H, W], got {images.dtype} {tuple(images.shape)}"
        )
    if len(images) == 0 or columns < 1 or scale < 1:
        raise UsageError(
            f"a grid needs images, columns >= 1 and scale >= 1; got {len(images)} images, "
            f"{columns} columns, scale {scale}"
        )
    height, width = images.shape[2] * scale, images.shape[3] * scale
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    mode = "L" if images.shape[1] == 1 else "RGB"
    size = (
        columns * (width + GRID_GAP_PIXELS) - GRID_GAP_PIXELS,
        rows * (height + GRID_GAP_PIXELS) - GRID_GAP_PIXELS,
    )
    grid = Image.new(mode, size, "white")
    for index, image in enumerate(images.cpu()):
        pixels = image[0] if mode == "L" else image.permute(1, 2, 0)
        tile = Image.fromarray(pixels.contiguous().numpy()).resize(
            (width, height), Image.Resampling.NEAREST
        )
        row, column = divmod(index, columns)
        grid.paste(tile, (column * (width + GRID_GAP_PIXELS), row * (height + GRID_GAP_PIXELS)))
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    return buffer.getvalue()
