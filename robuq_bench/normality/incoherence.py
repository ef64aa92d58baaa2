"""How far the largest entries of activations stand out: max over RMS, and kurtosis.

mu(x) = max |x_i| / RMS(x) of a token x [n] lies in [1, sqrt(n)]: 1 for a flat token, sqrt(n) for
one that is zero but for an entry. Source: the mu-incoherence of QuIP (Chee et al. 2023,
arXiv 2307.13304), there of weights. Of a whole tensor it has no such bound, for its largest token
is set beside the RMS of all.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class Incoherence:
    """Gathers what a layer sees, batch by batch.

    Entries are assumed finite; sums are float64.
    """

    def __init__(self) -> None:
        self.tokens = self.entries = 0
        self._peaks = self._peak = 0.0
        self._powers = np.zeros(4)

    def add(self, x: Tensor) -> None:
        """Take in tokens x [..., n], n >= 1."""
        tokens = x.detach().double().flatten(0, -2)
        peak, rms = tokens.abs().amax(-1), tokens.square().mean(-1).sqrt()
        # A token of zeros is as flat as any.
        self._peaks += float(torch.where(rms > 0, peak / rms, 1.0).sum())
        self._peak = max(self._peak, float(peak.max()))
        self._powers += [float(tokens.pow(power).sum()) for power in range(1, 5)]
        self.tokens += len(tokens)
        self.entries += tokens.numel()

    @property
    def of_tokens(self) -> float:
        """Mean of mu over tokens."""
        return self._peaks / self.tokens

    @property
    def of_tensor(self) -> float:
        """Largest entry of all tokens over the RMS of all; 1 where all are 0."""
        rms = math.sqrt(self._powers[1] / self.entries)
        return self._peak / rms if rms else 1.0

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over squared variance of all entries, 3 if normal; NaN if equal."""
        m1, m2, m3, m4 = self._powers / self.entries
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return float(fourth / variance**2) if variance > 1e-12 * m2 else math.nan
