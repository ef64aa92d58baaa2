"""Triton's kernels run on the CUDA device when there is one, else in its interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import SETS, force
from torch import Tensor


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        if tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
            return tensor.fill_(torch.iinfo(tensor.dtype).min)
        return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(255)

    return poisoned


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN or an extreme integer, so that an unwritten output is seen."""
    monkeypatch.setattr(torch, "empty", _poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", _poison(Tensor.new_empty))


@pytest.fixture(params=SETS)
def instructions(
    library: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> str:
    force(request.param, monkeypatch)
    return str(request.param)
