"""`QuantizedLinear`: a linear layer as slots, see `robuq_bench.methods.base`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.methods import SLOTS, Method
from robuq_bench.methods.site import Site
from robuq_bench.quantization import fast_paths
from robuq_bench.quantization.bits import QuantizedInput
from robuq_bench.quantization.gradient_clamp import check_gradients, clamps_gradient
from robuq_bench.quantization.guard import GuardedWeight, guarded_weight

OLD_NAMES = {
    "weight": "master_weight",
    "signs": "rotation.signs",
    "low_rank_up": "branch.up",
    "low_rank_down": "branch.down",
}
"""What a state of older code calls the tensors of a layer, and what they are called now."""


def check_methods(methods: Mapping[str, Method], linear: nn.Linear, name: str) -> None:
    """Raise the error of a method that cannot serve layer `name`, with that name."""
    if "centring" in methods and linear.bias is None:
        raise UsageError(
            f"layer {name!r}: centring: it has no bias, which the product of the centre would be "
            'added to; give the layer a rule of its own in [[layers]], with centring = "none"'
        )
    for slot, method in methods.items():
        try:
            method.check(linear.out_features, linear.in_features)
        except (ConfigError, UsageError) as error:
            raise type(error)(f"layer {name!r}: {slot}: {error}") from None


def rename_old_state(state: dict[str, Any], prefix: str) -> None:
    """Call the tensors of the layer at `prefix` what they are called now, in place."""
    for old, new in OLD_NAMES.items():
        if prefix + old in state:
            state.setdefault(prefix + new, state.pop(prefix + old))


class QuantizedLinear(QuantizedInput):
    """y = Q_a(x') Q_w(W)^T + branch(x') + bias, x' = R((x - c) / s).

    W, the parameter `master_weight` [out, in], is scaled, rotated and without the branch; `bias`
    begins with the product of c by the weight before all that. The
    attribute `weight` tells shape, dtype and device and refuses arithmetic. Q_w(W) is computed in
    every forward pass, but for a `cached_weights` block.

    Attributes:
        name: layer name in its model, which with a seed decides what is drawn.
        methods: by slot, what the plan chose.
        chooses: of what an allocation may choose bits, "activation" or "weight".
        centring, scaling, rotation, branch, weight_quantizer, activation_quantizer: the modules in
            the slots; None where a slot is empty.
        activation_bits: bits per activation, None = not quantized; may be changed at any time,
            and kept in the state dict.
    """

    master_weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: nn.Module | None

    def __init__(self, weight: Tensor, bias: Tensor | None, name: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.name = name
        self.methods: dict[str, Method] = {}
        self.chooses = frozenset[str]()
        self.master_weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.weight_quantizer = None
        self._cache: list[tuple[Any, Tensor]] | None = None
        self._watched: weakref.ref[nn.Parameter] | None = None

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, linear: nn.Linear, methods: Mapping[str, Method], site: Site
    ) -> QuantizedLinear:
        """Convert a linear layer; the result computes the same function up to quantization.

        Args:
            linear: any dtype of floats; its values are read, not changed.
            methods: by slot, those that are filled.
            site: name and seed of the layer, and what calibration saw at its input.

        Raises:
            ConfigError: a method does not serve this shape.
            UsageError: a method needs what `site` did not see.
        """
        check_methods(methods, linear, site.name)
        dtype, device = linear.weight.dtype, linear.weight.device
        weight = linear.weight.detach().double()
        bias = None if linear.bias is None else linear.bias.detach().clone()
        modules: dict[str, nn.Module] = {}
        for slot in SLOTS:
            if slot not in methods:
                continue
            fitted: Any = methods[slot].fit(weight, site)
            if slot == "weight" and isinstance(fitted, tuple):
                fitted, weight = fitted
            module = modules[slot] = fitted.to(device)
            if slot == "branch":
                weight = module.weight(weight)
                _cast(module, dtype)
                continue
            # Float32 at least: what rounds here would no longer cancel, or move every point.
            _cast(module, torch.promote_types(dtype, torch.float32))
            if slot == "centring":
                assert bias is not None  # as checked above
                bias = (bias.double() + weight @ module.centre.double()).to(bias.dtype)
                site = site.less(module.centre)
            if slot in ("scaling", "rotation"):
                weight = module.weight(weight)
                site = site.through(module, diagonal=slot == "scaling")
        layer = cls(weight.to(dtype), bias, site.name)
        layer.methods = dict(methods)
        layer.centring = modules.get("centring")
        layer.scaling, layer.rotation = modules.get("scaling"), modules.get("rotation")
        layer.branch, layer.weight_quantizer = modules.get("branch"), modules.get("weight")
        layer.activation_quantizer = modules.get("activation")
        if "activation" in methods:
            layer.activation_bits = methods["activation"].bits  # type: ignore[attr-defined]
        layer.requires_grad_(linear.weight.requires_grad)
        if layer.bias is not None and linear.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    @property
    def weight(self) -> GuardedWeight:
        """Shape, dtype and device of the weight; arithmetic on it is a UsageError."""
        return guarded_weight(self.master_weight, tuple(self.master_weight.shape), self.name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy made in a `cached_weights` block would keep the cache for ever.
        return {**self.__dict__, "_cache": None, "_watched": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_old_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the product."""
        return self.master_weight

    def quantized_weight(self) -> Tensor:
        """Dequantized weight [out, in], differentiable."""
        return self.product_weight(None)

    def product_weight(self, dtype: torch.dtype | None) -> Tensor:
        """The same in `dtype`; None is the master weight's."""
        return fast_paths.quantized_weight(self.master_weight, self.weight_quantizer, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if x.shape[-1] != self.in_features:
            raise UsageError(
                f"layer {self.name!r} takes {self.in_features} features, got {tuple(x.shape)}"
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and clamps_gradient(self):
            check_gradients(self, x)
        x = self.centre_input(x)
        path = fast_paths.path_for(self, x)
        return path.product(self, x, self._cached(path))

    def _cached(self, path: fast_paths.Path) -> Tensor:
        """The weight that `path` multiplies by; kept inside a `cached_weights` block."""
        if self._cache is None or torch.compiler.is_compiling():
            return path.weight(self)
        sources = [*self.parameters(), *self.buffers()]
        needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in sources)
        if self.training or needs_grad or any(p.is_inference() for p in sources):
            return path.weight(self)
        # The kernels make it in the dtype of the product, which autocast decides. The sources are
        # held, so that no other tensor can take their place in memory.
        dtype = fast_paths.product_dtype(self.master_weight)
        key = (path.name, dtype, [(p, p._version) for p in sources])
        if not self._cache or not _is_same(self._cache[0][0], key):
            # A tensor made in inference mode could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._cache[:] = [(key, path.weight(self))]
        return self._cache[0][1]

    def extra_repr(self) -> str:
        bits = "fp" if self.activation_bits is None else f"{self.activation_bits} bits"
        chosen = ", ".join(f"{slot}={method.method}" for slot, method in self.methods.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {chosen or 'empty'}"
            f", activations {bits}"
        )


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Floats of a module to the dtype of its layer, contiguous."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for value in tensors.values():
                if value is not None and value.is_floating_point():
                    value.data = value.data.to(dtype).contiguous()


def _is_same(a: Any, b: Any) -> bool:
    """Whether two keys of the cache name the same path and tensors, unchanged."""
    return (
        a[:2] == b[:2]
        and len(a[2]) == len(b[2])
        and all(
            p is q and version == other for (p, version), (q, other) in zip(a[2], b[2], strict=True)
        )
    )


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Compute the quantized weight of every layer once, for passes in eval mode inside the block.

    For loops that own the model. In-place operations, `load_state_dict` and `functional_call` are
    seen; writing through `.data` inside the block is not.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m._cache is None]
    for layer in layers:
        layer._cache = []
    try:
        yield
    finally:
        for layer in layers:
            layer._cache = None
