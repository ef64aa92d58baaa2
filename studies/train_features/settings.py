"""Settings of `study train-features`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from robuq_bench.judging.feature_recipe import FeatureRecipe
from robuq_bench.sections import Name, none_word


class Settings(FeatureRecipe):
    """The network's recipe, and what its metrics are called after (None: the workload)."""

    name: Annotated[Name | None, BeforeValidator(none_word)] = None
