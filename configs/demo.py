"""MoRA on the embedded model and instruction set: about ten seconds on two cores.

    mora-jax train --config configs/demo.py --config.adapter.kind=rotation

What it should score: a response perplexity on the held-out questions that is near 1.
"""

from ml_collections import ConfigDict

from mora_jax.demo import data_path, model_path


def get_config() -> ConfigDict:
    """The keys that differ from the defaults."""
    config = ConfigDict()
    config.out = "runs/demo"

    config.model = ConfigDict()
    config.model.path = model_path()
    config.model.dtype = "float32"

    config.adapter = ConfigDict()
    config.adapter.method = "mora"
    config.adapter.kind = "sharing"
    config.adapter.rank = 8

    config.data = ConfigDict()
    config.data.train = (data_path("train"),)
    config.data.eval = (data_path("held_out"),)
    config.data.max_length = 64

    config.train = ConfigDict()
    config.train.steps = 150
    config.train.batch_size = 32
    config.train.log_every = 10

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 10
    return config
