"""Where a method is fitted: a layer's name and seed, and what was seen at its input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robuq_bench.errors import UsageError

if TYPE_CHECKING:
    from robuq_bench.methods.base import Need


@dataclass(frozen=True)
class Site:
    """A layer that a method is fitted to.

    Attributes:
        name: the layer's first name in its model.
        seed: of everything that is drawn, together with the name.
        tokens: [T, in] float32, a sample of the inputs; None when calibration saw none.
        absmax: [in] float32, largest magnitude of each channel over all inputs seen.
        gram: [in, in] float64, sum of x^T x over all inputs seen, and `count` their number.
        mean: [in] float64, of each channel over all inputs seen.

    `is_blank` says that values are loaded afterwards, so that only shapes count: a search for
    good ones may be left out. All statistics are in the basis of the slots that were fitted
    before: less the centre, divided by the scaling, rotated by the rotation. After a centring or a
    rotation `absmax` is that of the sample, because the one of all inputs cannot be had from it.
    """

    name: str = ""
    seed: int = 0
    tokens: Tensor | None = None
    absmax: Tensor | None = None
    gram: Tensor | None = None
    count: int = 0
    mean: Tensor | None = None
    is_blank: bool = False

    @classmethod
    def blank(
        cls,
        name: str,
        in_features: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> Site:
        """A site that saw a few normal inputs: for layers whose values are loaded afterwards."""
        tokens = torch.randn(64, in_features, generator=torch.Generator().manual_seed(0))
        eye = torch.eye(in_features, dtype=torch.float64, device=device)
        absmax, mean = torch.ones(in_features, device=device), eye.new_zeros(in_features)
        return cls(name, seed, tokens.to(device), absmax, eye, in_features, mean, is_blank=True)

    def need(self, what: Need) -> Tensor:
        """`tokens`, `absmax`, `mean` or `gram`.

        Raises:
            UsageError: calibration saw none; names the layer.
        """
        value = getattr(self, what)
        if value is None:
            raise UsageError(
                f"layer {self.name!r}: its plan needs {what} of its inputs, and none were "
                "observed; give quantize_ a calibration set"
            )
        found: Tensor = value
        return found

    def through(self, module: nn.Module, *, diagonal: bool = False) -> Site:
        """The same inputs after a fitted scaling (`diagonal`) or rotation."""
        with torch.no_grad():
            tokens = None if self.tokens is None else module(self.tokens)
            absmax = self.absmax
            if absmax is not None and diagonal:
                absmax = module(absmax).abs()
            elif absmax is not None:
                absmax = None if tokens is None else tokens.abs().amax(0)
            mean = None if self.mean is None else module(self.mean)
            gram = None if self.gram is None else module(module(self.gram).T)
        return replace(self, tokens=tokens, absmax=absmax, mean=mean, gram=gram)

    def less(self, centre: Tensor) -> Site:
        """The same inputs after `centre` [in] was subtracted.

        Raises:
            UsageError: there is a Gram matrix without the mean, which tells how it changes.
        """
        tokens = None if self.tokens is None else self.tokens - centre.to(self.tokens)
        absmax = None if self.absmax is None or tokens is None else tokens.abs().amax(0)
        mean = None if self.mean is None else self.mean - centre.to(self.mean)
        gram = self.gram
        if gram is not None:
            old, c = self.need("mean").to(gram), centre.to(gram)
            # sum (x - c)(x - c)^T, with m the mean: sum x x^T - n (m c^T + c m^T - c c^T)
            gram = gram - self.count * (old.outer(c) + c.outer(old) - c.outer(c))
        return replace(self, tokens=tokens, absmax=absmax, mean=mean, gram=gram)
