"""LoRA on the embedded model and instructions, by the ordinary trainer (`make demo` compares all methods).

    mora-jax train --config configs/demo.py --config.out=runs/demo_lora

Model and data come with the package; 150 steps take about 40 seconds of CPU time.
"""

import ml_collections

from mora_jax import demo


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the defaults."""
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict({"path": demo.model_path(), "dtype": "float32"})
    config.data = ml_collections.ConfigDict()
    config.data.train = (demo.data_path("train"),)
    config.data.eval = (demo.data_path("held_out"),)
    config.train = ml_collections.ConfigDict({"steps": 150, "batch_size": 32, "log_every": 10})
    config.optimizer = ml_collections.ConfigDict({"learning_rate": 4e-3, "warmup_steps": 10})
    return config
