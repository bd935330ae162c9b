"""BitFit."""

from __future__ import annotations

from dataclasses import dataclass

from mora_jax.adapters.config.common import CommonConfig, Targets


@dataclass(frozen=True)
class BitFitConfig(CommonConfig):
    """BitFit (Ben Zaken et al., 2021, arXiv 2106.10199): the biases alone are trained.

    Attributes:
        targets: whose biases, see `mora_jax.adapters.config`; a layer without a bias gets one that starts at zero.
    """

    targets: Targets = "all-linear"
