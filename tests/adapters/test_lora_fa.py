"""LoRA-FA trains B alone and keeps no wide activation for it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.products.matmul import FusedLayout


def test_only_b_is_trained_and_the_input_is_not_kept():
    layer = nnx.Linear(8, 5, rngs=nnx.Rngs(0))
    report = mj.attach(layer, mj.LoRAFAConfig(rank=2), rngs=nnx.Rngs(1))
    assert report.trainable == 10
    assert np.abs(layer.adapter.lora_a[...]).max() > 0
    delta = layer.adapter.fuse(FusedLayout((5,), 0, (5,)), (layer.adapter.config,))
    _, residuals = delta.forward(jnp.ones((7, 8)), (layer.adapter.params(),))
    assert (7, 8) not in {leaf.shape for leaf in jax.tree.leaves(residuals)}
