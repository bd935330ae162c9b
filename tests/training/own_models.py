"""Small transformers that a user could have written: plain, with tied embeddings and odd names, and stacked."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Layer(nnx.Module):
    def __init__(self, width, dropout=0.0, *, rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Einsum("btd,de->bte", (width, width), rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x, mask):
        q, k, v = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        scores = jnp.einsum("btd,bsd->bts", q, k) / np.sqrt(q.shape[-1])
        return x + self.drop(self.out(jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)) @ v))


def mask_of(segments):
    """Causal, and within an example."""
    places = jnp.arange(segments.shape[1])
    return (segments[:, :, None] == segments[:, None]) & (places[:, None] >= places)


class Plain(nnx.Module):
    """A list of layers, an output head of its own."""

    def __init__(self, dropout=0.0, vocab=261, width=16):
        rngs = nnx.Rngs(0)
        self.tokens = nnx.Embed(vocab, width, rngs=rngs)
        self.places = nnx.Embed(512, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, dropout, rngs=rngs) for _ in range(2)])
        self.logits = nnx.Linear(width, vocab, rngs=rngs)

    def __call__(self, input_ids, segment_ids, positions):
        x = self.tokens(input_ids) + self.places(positions)
        mask = mask_of(segment_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.logits(x)


class Tied(nnx.Module):
    """One table for both ends, held twice, and names that mean something else elsewhere."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.lm_head = nnx.Embed(261, 16, rngs=rngs)
        self.embed_tokens = self.lm_head
        self.model = nnx.Dict({"0": Layer(16, rngs=rngs), "kernel": Layer(16, rngs=rngs)})

    def __call__(self, input_ids, segment_ids, positions):
        x = self.embed_tokens(input_ids)
        for name in ("0", "kernel"):
            x = self.model[name](x, mask_of(segment_ids))
        return self.lm_head.attend(x).astype(jnp.bfloat16)


class Stacked(nnx.Module):
    """Layers made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.tokens = nnx.Embed(261, 16, rngs=rngs)
        self.stack = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Layer(16, rngs=rngs)))(rngs)

    def __call__(self, input_ids, segment_ids, positions):
        mask = mask_of(segment_ids)
        scan = nnx.scan(lambda x, layer: layer(x, mask), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.tokens.attend(scan(self.tokens(input_ids), self.stack))
