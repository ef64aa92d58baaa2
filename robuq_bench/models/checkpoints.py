"""Teachers from disk, and DiT weights between facebookresearch's and diffusers' layouts.

Layouts: facebookresearch/DiT `models.py` and huggingface/diffusers `dit_transformer_2d.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robuq_bench.checkpointing import load_untrusted_checkpoint
from robuq_bench.config import asset_path
from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError, suggest
from robuq_bench.models.dit import DiT, sincos_position_embedding
from robuq_bench.models.outliers import add_outliers_
from robuq_bench.weight_files import checkpoint_digest

ASSET_PREFIX = "asset:"
LISTED_PROBLEMS = 4
#: Of the weights of a teacher; all are read in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WHOLE = (torch.int64, torch.int32, torch.uint8)

#: What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: A tensor that every DiT has, in either layout: what precedes its name precedes all names.
_ANCHORS = ("x_embedder.proj.weight", "pos_embed.proj.weight")

#: facebookresearch name -> diffusers name, one each, with the suffixes weight and bias.
_STEM_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
#: The same inside block i: `blocks.i.` and `transformer_blocks.i.`.
_BLOCK_LAYERS = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
#: Conditioning, which diffusers repeats in every block under `norm1.emb.`.
_SHARED_TENSORS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_SUFFIXES = ("weight", "bias")
_QKV = ("to_q", "to_k", "to_v")


def load_teacher(workload: Any, device: str | torch.device) -> tuple[DiT, str]:
    """Load a workload's full-precision DiT in float32 and eval mode, on `device`.

    `teacher.checkpoint` is 'asset:NAME' (shipped with the package), the path of a safetensors or
    PyTorch file, or a folder of diffusers' `save_pretrained`, sharded or not: a bare state dict,
    DiT's train.py checkpoint (its moving average is taken), or diffusers' layout; a prefix that
    all names have is left out. A pickle cannot run code. Outliers of `teacher.outliers` are put in.

    Returns:
        The model, and the `checkpoint_digest` of its file or files (64 hex digits), which knows
        nothing of outliers.

    Raises:
        UsageError: the outliers change what the model computes.
        MissingResourceError: no checkpoint is named, or no asset has that name.
        CheckpointError: the file is missing, damaged, refused, or does not fit `workload.model`.
    """
    path = resolve_checkpoint(workload)
    state = load_untrusted_checkpoint(path, expected_sha256=workload.teacher.sha256 or None)
    try:
        state = without_prefixes(state)
        if any(name.startswith("transformer_blocks.") for name in state):
            expected = DiT.without_values(workload.model).state_dict()
            check_weights(to_diffusers(expected), state)
            state = from_diffusers(state, workload.model.input_size)
        model = build_model(workload.model, state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model = model.to(device)
    if workload.teacher.outliers is not None:
        add_outliers_(model, workload.teacher.outliers)
    return model, workload.teacher.sha256 or checkpoint_digest(path)


def resolve_checkpoint(workload: Any) -> Path:
    """Return the path of a workload's teacher checkpoint; the file of a path may be absent.

    Raises MissingResourceError when none is named, or the asset does not exist.
    """
    name = workload.teacher.checkpoint
    if not name:
        raise MissingResourceError(
            f"workload {workload.name!r} has no teacher checkpoint; make one with `train-teacher "
            f"--workload {workload.name}` and pass --set teacher.checkpoint=PATH"
        )
    if name.startswith(ASSET_PREFIX):
        asset = name.removeprefix(ASSET_PREFIX)
        known = [file.name for file in asset_path(ASSET_PREFIX).glob("*.safetensors")]
        if asset not in known:
            raise MissingResourceError(
                f"the package ships no asset {asset!r}{suggest(asset, known)}; make the teacher "
                f"with `train-teacher --workload {workload.name}`, or give a path"
            )
    return asset_path(name)


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DiT's state dict without what wrappers put before and into its names.

    Components of torch's own wrappers ("module.", "_orig_mod.") go wherever they are; any other
    prefix, such as "dit.", goes when all names have it.

    Raises CheckpointError naming the prefix when only some names have it, as beside a discriminator
    or a second copy of the weights: which part is meant cannot be told.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in plain:
            raise CheckpointError(f"{short} is there twice, with and without a wrapper's prefix")
        plain[short] = tensor
    prefixes = sorted(
        {
            name.removesuffix(anchor)
            for name in plain
            for anchor in _ANCHORS
            if name == anchor or name.endswith(f".{anchor}")
        }
    )
    if len(prefixes) > 1:
        raise CheckpointError(
            f"it holds {len(prefixes)} models, with the prefixes "
            f"{', '.join(map(repr, prefixes))}; save the state dict of one alone"
        )
    prefix = prefixes[0] if prefixes else ""
    others = [name for name in plain if not name.startswith(prefix)]
    if others:
        raise CheckpointError(
            f"its model has the prefix {prefix!r}, but {_listing('names do not', others)}; save "
            "the model's state dict alone"
        )
    return {name.removeprefix(prefix): tensor for name, tensor in plain.items()}


def check_weights(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `state` fits `expected`: names, shapes, finite values, `DTYPES`.

    It lists names that are missing (with the nearest one that is there), unexpected, or wrong;
    counters, whole numbers in `expected`, may be of any type in `WHOLE`.
    """
    unexpected = sorted(state.keys() - expected.keys())
    shared = expected.keys() & state.keys()
    readable = {
        name
        for name in shared
        if state[name].dtype in (DTYPES if expected[name].is_floating_point() else WHOLE)
    }
    problems = {
        "missing": _with_nearest(expected.keys() - state.keys(), unexpected),
        "unexpected": unexpected,
        "of another shape": [
            f"{name} {list(state[name].shape)} for {list(expected[name].shape)}"
            for name in shared
            if state[name].shape != expected[name].shape
        ],
        "of a dtype that is not read": [
            f"{name} ({str(state[name].dtype).removeprefix('torch.')})"
            for name in shared - readable
        ],
        "not finite": [
            name for name in readable if not bool(torch.isfinite(state[name].float()).all())
        ],
    }
    if any(problems.values()):
        raise CheckpointError(
            "the weights do not fit the model: "
            + "; ".join(_listing(label, names) for label, names in problems.items() if names)
        )


def build_model(model_config: Any, state: Mapping[str, Tensor]) -> DiT:
    """Return a DiT (float32, CPU, eval mode) with exactly these weights, copied.

    Raises CheckpointError as `check_weights`. No random number is drawn.
    """
    model = DiT.without_values(model_config)
    expected = model.state_dict()
    check_weights(expected, state)
    copies = {name: state[name].to(torch.float32, copy=True) for name in expected}
    model.load_state_dict(copies, assign=True)
    return model.eval()


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a facebookresearch DiT state dict to the names of diffusers' DiTTransformer2DModel.

    qkv is split, the conditioning embedders are repeated per block (tensors are shared, not
    copied) and the position table is left out: diffusers recomputes it. The label table keeps
    its rows, the null label last, so `num_embeds_ada_norm` is the number of rows minus one.

    The result computes what this model does only up to diffusers' own choices: timestep
    frequencies divided by 127 in place of 128, and `norm_eps` 1e-5 in place of 1e-6.

    Raises CheckpointError on missing or unexpected names.
    """
    source = _Source(state)
    converted = {}
    for ours, theirs in _STEM_LAYERS.items():
        for suffix in _SUFFIXES:
            converted[f"{theirs}.{suffix}"] = source.take(f"{ours}.{suffix}")
    shared = {theirs: source.take(ours) for ours, theirs in _SHARED_TENSORS.items()}
    source.take("pos_embed")
    for index in range(_depth(state, "blocks")):
        ours_prefix, theirs_prefix = f"blocks.{index}.", f"transformer_blocks.{index}."
        for theirs, tensor in shared.items():
            converted[f"{theirs_prefix}norm1.emb.{theirs}"] = tensor
        for suffix in _SUFFIXES:
            for ours, theirs in _BLOCK_LAYERS.items():
                converted[f"{theirs_prefix}{theirs}.{suffix}"] = source.take(
                    f"{ours_prefix}{ours}.{suffix}"
                )
            # Not strict: a missing tensor has one part, and `finish` reports it.
            parts = source.take(f"{ours_prefix}attn.qkv.{suffix}").chunk(3)
            for theirs, tensor in zip(_QKV, parts, strict=False):
                converted[f"{theirs_prefix}attn1.{theirs}.{suffix}"] = tensor
    source.finish()
    return converted


def from_diffusers(state: Mapping[str, Tensor], input_size: int) -> dict[str, Tensor]:
    """Convert a diffusers DiTTransformer2DModel state dict to facebookresearch's names.

    The exact inverse of `to_diffusers`; the position table is computed for input_size (pixels
    or latent cells per side, diffusers' `sample_size`), as diffusers stores none.

    Raises CheckpointError on missing or unexpected names, or when the blocks' copies of the
    conditioning embedder differ, which the original layout cannot express.
    """
    source = _Source(state)
    converted = {}
    for ours, theirs in _STEM_LAYERS.items():
        for suffix in _SUFFIXES:
            converted[f"{ours}.{suffix}"] = source.take(f"{theirs}.{suffix}")
    different = []
    for index in range(_depth(state, "transformer_blocks")):
        ours_prefix, theirs_prefix = f"blocks.{index}.", f"transformer_blocks.{index}."
        for ours, theirs in _SHARED_TENSORS.items():
            tensor = source.take(f"{theirs_prefix}norm1.emb.{theirs}")
            if not torch.equal(converted.setdefault(ours, tensor), tensor):
                different.append(f"{theirs_prefix}norm1.emb.{theirs}")
        for suffix in _SUFFIXES:
            for ours, theirs in _BLOCK_LAYERS.items():
                converted[f"{ours_prefix}{ours}.{suffix}"] = source.take(
                    f"{theirs_prefix}{theirs}.{suffix}"
                )
            parts = [source.take(f"{theirs_prefix}attn1.{name}.{suffix}") for name in _QKV]
            converted[f"{ours_prefix}attn.qkv.{suffix}"] = torch.cat(parts)
    source.finish()
    if different:
        raise CheckpointError(
            "a DiT has one conditioning embedder for all blocks, but these tensors differ from "
            f"block 0's: {_listing('different', different)}"
        )
    hidden_size, _, patch_size, _ = converted["x_embedder.proj.weight"].shape
    if input_size % patch_size:
        raise UsageError(f"input_size {input_size} is not divisible by patch size {patch_size}")
    table = sincos_position_embedding(hidden_size, input_size // patch_size)
    converted["pos_embed"] = table[None]
    return converted


class _Source:
    """A state dict that is used up tensor by tensor; `finish` tells what was amiss."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.remaining = dict(state)
        self.missing: list[str] = []

    def take(self, name: str) -> Tensor:
        if name not in self.remaining:
            self.missing.append(name)
            return torch.empty(0)
        return self.remaining.pop(name)

    def finish(self) -> None:
        missing = _with_nearest(self.missing, list(self.remaining))
        problems = {"missing": missing, "unexpected": list(self.remaining)}
        if any(problems.values()):
            raise CheckpointError(
                "not a DiT state dict of the expected layout: "
                + "; ".join(_listing(label, names) for label, names in problems.items() if names)
            )


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return one more than the highest block index, at least 1, so that lacking blocks are told."""
    found = [re.match(rf"{prefix}\.(\d+)\.", name) for name in state]
    return 1 + max((int(match[1]) for match in found if match), default=0)


def _with_nearest(missing: Iterable[str], there: list[str]) -> list[str]:
    """Missing names, sorted, each of those that are shown with the nearest name that is there."""
    ordered = sorted(missing)
    for index, name in enumerate(ordered[:LISTED_PROBLEMS]):
        near = get_close_matches(name, there, n=1, cutoff=0.8)
        ordered[index] += f" (there is {near[0]})" if near else ""
    return ordered


def _listing(label: str, names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:LISTED_PROBLEMS])
    rest = f" and {len(ordered) - LISTED_PROBLEMS} more" if len(ordered) > LISTED_PROBLEMS else ""
    return f"{len(ordered)} {label}: {shown}{rest}"
