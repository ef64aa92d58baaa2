"""Observed inputs that a fit can rely on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from robuq_bench.errors import UsageError

if TYPE_CHECKING:
    from robuq_bench.methods.base import Need
    from robuq_bench.methods.site import Site


def finite(site: Site, what: Need) -> Tensor:
    """`site.need(what)`, which must hold a number and no infinity or NaN.

    Raises:
        UsageError: nothing was observed, or a value is not finite; the message names the layer.
    """
    values = site.need(what)
    if values.numel() == 0:
        raise UsageError(
            f"layer {site.name!r}: the {what} of its inputs are empty; give quantize_ a "
            "calibration set that reaches this layer"
        )
    if not bool(values.isfinite().all()):
        raise UsageError(
            f"layer {site.name!r}: the {what} of its calibration inputs are not all finite; find "
            "where the model overflows, or skip the layer"
        )
    return values
