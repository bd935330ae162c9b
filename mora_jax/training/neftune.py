"""NEFTune: uniform noise on the embeddings of the training step (Jain et al., 2023, arXiv 2310.05914)."""

import jax
import jax.numpy as jnp
from jax import Array

from mora_jax.models.segments import default_positions, segment_lengths


def embedding_noise(key: Array, rows: Array, segment_ids: Array, width: int, alpha: float) -> Array:
    """Noise uniform in ±alpha / √(L · width), L the number of tokens of the token's own example.

    A token's draw follows from its row's number, its example and its place in it: it doesn't depend on how rows are
    split into micro-batches or laid on devices, nor on padding or on the lengths of other examples in the row.

    Args:
        key: of the step.
        rows: int `[B]`, the number of each row in the step.
        segment_ids: int `[B, T]`, the example of each token; 0 is padding.
        width: size of an embedding.
        alpha: NEFTune's strength; the paper uses 5 to 15.

    Returns:
        float32 `[B, T, width]`, 0 at padding.
    """

    def draw(key: Array, example: Array, place: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(key, example), place)
        return jax.random.uniform(key, (width,), jnp.float32, -1.0, 1.0)

    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    drawn = jax.vmap(jax.vmap(draw, (None, 0, 0)))(row_keys, segment_ids, default_positions(segment_ids))
    bound = alpha * jax.lax.rsqrt(segment_lengths(segment_ids).astype(jnp.float32) * width)
    return jnp.where(segment_ids > 0, bound, 0.0)[..., None] * drawn
