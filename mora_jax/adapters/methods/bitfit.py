"""BitFit: `y = x W + b + Δb`, biases alone are trained (Ben Zaken et al., 2021, arXiv 2106.10199, section 3).

The change of a bias is a parameter of its own that starts at zero; adaptive optimizers take the same steps as on the
bias itself. A layer without a bias gets one.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from mora_jax.adapters.base import Adapter
from mora_jax.adapters.config.common import CommonConfig, Targets


@dataclass(frozen=True)
class BitFitConfig(CommonConfig):
    """BitFit (Ben Zaken et al., 2021, arXiv 2106.10199): the biases alone are trained.

    `y = x W + b + Δb` (section 3).

    Attributes:
        targets: whose biases, see `mora_jax.adapters.config`; a layer without a bias gets one that starts at zero.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.BitFitConfig(), rngs=1).trainable  # Δb [4]
        4
    """

    targets: Targets = "all-linear"
    biases_alone = True


class BitFit(Adapter):
    """A trained addition to the bias of one matrix, or of a stack of them."""

    method: ClassVar[str] = "bitfit"
    additive: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int, config: BitFitConfig, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        self.train_bias()

    @classmethod
    def only(cls, config: Any) -> BitFitConfig:
        """The configuration of a bias that another method trains beside its own layers."""
        return BitFitConfig(targets=config.targets)
