"""Fine-tunes a Llama of Tunix's by `mora_jax.finetune`, and this library's decoder beside it: are the losses the same?

    python -m venv TUNIX && TUNIX/bin/pip install google-tunix qwix
    TUNIX/bin/python scripts/finetune_tunix.py

Both have the weights of the embedded model and adapters that start with the same values; rows are packed. Prints the
losses of each step; exits 1 where they differ by more than 1e-4.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from check_checkpoints import ROPE, tunix_model
from flax import nnx

import mora_jax as mj
from mora_jax import demo

ROWS = [{"instruction": f"Say lamp {i}.", "output": f"In capitals lamp {i} is LAMP {i}."} for i in range(32)]
SETTINGS: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "config": {"data.max_length": 64, "data.packing": True},
}


class Wrapped(nnx.Module):
    """A model of Tunix's with the call that `finetune` makes."""

    def __init__(self, model: nnx.Module) -> None:
        self.model = model

    def __call__(self, ids: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Logits `[B, T, V]`: tokens see earlier ones of their example."""
        order = jnp.arange(ids.shape[1])
        mask = (segment_ids[:, :, None] == segment_ids[:, None]) & (order[:, None] >= order)
        return self.model(ids, positions, None, mask)[0]


def main() -> int:
    """Prints both rows of losses."""
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        shutil.copytree(demo.model_path(), base)
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        (base / "config.json").write_text(json.dumps(config | ROPE), encoding="utf-8")
        ours, tokenizer = mj.load_pretrained(base, dtype="float32")
        theirs = Wrapped(tunix_model(base))
    for model in (ours, theirs):
        mj.attach(model, mj.LoRAConfig(rank=2, targets=["q_proj", "v_proj"]), rngs=0)
    starts = {path[-2:]: value[...] for path, value in nnx.to_flat_state(nnx.state(ours, mj.AdapterParam))}
    factors = nnx.to_flat_state(nnx.state(theirs, mj.AdapterParam))
    for path, factor in factors:  # ours are stacked: [layers, …]
        projection = next(name for name in ("q_proj", "v_proj") if name in path)
        layer = next(part for part in path if isinstance(part, int))
        factor.set_value(starts[projection, path[-1]][layer].reshape(factor.shape))
    nnx.update(theirs, nnx.from_flat_state(factors))
    losses = []
    for name, model in (("Tunix's", theirs), ("ours", ours)):
        result = mj.finetune(model, ROWS, tokenizer=tokenizer, **SETTINGS)
        losses.append([row["loss"] for row in result.metrics])
        print(name, *(f"{loss:.5f}" for loss in losses[-1]))
    return int(not np.allclose(*losses, atol=1e-4))


if __name__ == "__main__":
    sys.exit(main())
