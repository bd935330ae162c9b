"""Where LoRA's factors start.

| `init`       | A, B                                   | from                                    |
|--------------|----------------------------------------|-----------------------------------------|
| `kaiming`    | A uniform in ±1/√in, B zero            | Hu et al., 2021, arXiv 2106.09685       |
| `gaussian`   | A normal with deviation 1/rank, B zero | PEFT's `"gaussian"`                     |
| `orthogonal` | random, neither zero, with A B = 0     | PEFT's `"orthogonal"`                   |
| `eva`        | principal directions of inputs, B zero | Paischer et al., 2024, arXiv 2410.07170 |
| `pissa`      | principal singular vectors of W        | Meng et al., 2024, arXiv 2404.02948     |
| `olora`      | the first columns of W = Q R           | Büyükakyüz, 2024, arXiv 2406.01775      |

The last two start from an update that is not zero. The papers subtract it from the frozen W; here W stays as it is and
the update itself is counted from its start, `s (A B − A₀ B₀)`, which is the same function with the same gradients. So
step 0 is the base bit for bit, in bfloat16 too, where W − s A₀ B₀ would be rounded; and the base is there whenever the
adapter is removed. As one plain LoRA of twice the rank it is `[A, A₀]` and `[B; −B₀]`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax.adapters.products.matmul import widened

FROM_BASE = ("pissa", "olora")


def pissa(kernel: Array, rank: int, scaling: Array) -> tuple[Array, Array]:
    """`A = U_r √(Σ_r / s)`, `B = √(Σ_r / s) V_rᵀ` of `W = U Σ Vᵀ`, so that s A B is W's best rank-r part.

    Args:
        kernel: `[in, out]`.
        rank: at most the smaller side of the kernel.
        scaling: s; 0 for a layer that is left out.

    Returns:
        float32 `(A [in, rank], B [rank, out])`.
    """
    u, sigma, vt = jnp.linalg.svd(widened(kernel), full_matrices=False)
    root = jnp.sqrt(sigma[:rank] / jnp.where(scaling == 0, 1.0, scaling))
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def olora(kernel: Array, rank: int, scaling: Array) -> tuple[Array, Array]:
    """`B = Q_rᵀ`, `A = R_rᵀ` of `Wᵀ = Q R`; arguments and result as in `pissa`, whatever the scaling."""
    q, r = jnp.linalg.qr(widened(kernel).T)
    return r[:rank].T, q[:, :rank].T


def is_start(init: str, kernel: np.ndarray, lora_a: np.ndarray, lora_b: np.ndarray, scaling: float) -> bool:
    """Whether `pissa` or `olora`, as `init` says, could have given these factors for this kernel, up to its rounding.

    A decomposition is recognised by what defines it, without being made again.
    """
    kernel, lora_a, lora_b = (np.asarray(array, np.float64) for array in (kernel, lora_a, lora_b))
    if init == "pissa":  # pairs of singular vectors, W v = σ u and Wᵀ u = σ v, with √(σ / s) on both
        sigma = scaling * np.square(lora_a).sum(0)
        return _near(kernel @ lora_b.T, lora_a * sigma) and _near(lora_a.T @ kernel, sigma[:, None] * lora_b)
    rank = len(lora_b)  # Wᵀ = Q R: R = Qᵀ Wᵀ, and the first columns of Wᵀ are in the span of as many of Q
    return _near(kernel @ lora_b.T, lora_a) and _near(lora_a[:rank] @ lora_b, kernel[:rank])


def _near(actual: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal up to what the rounding of a bfloat16 base leaves."""
    return bool(np.linalg.norm(actual - wanted) <= 0.02 * np.linalg.norm(wanted))


def orthogonal(key: Array, in_features: int, out_features: int, rank: int) -> tuple[Array, Array]:
    """Random factors with A B = 0 up to rounding, neither of them zero; `rank` is even.

    Returns:
        float32 `(A [in, rank], B [rank, out])`.
    """
    square, left, right = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(square, (rank, rank), jnp.float32))
    lora_a = jax.random.normal(left, (in_features, rank // 2), jnp.float32) @ q[0::2] / 10.0
    lora_b = jax.random.normal(right, (out_features, rank // 2), jnp.float32) @ q[1::2] / 10.0
    return lora_a, lora_b.T
