"""Gemma-3-1B with LoRA rank 16 on a single TPU v5e chip, as in a Colab.

    pip install 'mora-jax[tpu]'
    mora-jax train --config configs/tpu_v5e_1_gemma3_1b_lora.py \
        --config.model.path=google/gemma-3-1b-it \
        --config.data.train=train.jsonl --config.out=runs/gemma3-1b_lora

Needs one v5e chip (16 GiB). Planned, not measured (`mora-jax plan --config configs/tpu_v5e_1_gemma3_1b_lora.py --model
gemma3-1b --accelerator v5e-1`, memory by formula): 4.7 of 16.9 GB on each chip; 0.5 to 0.9 s a step, 17,600 to 30,700
tokens/s a chip, 0.1 hours in all. What it scores depends on the data; no run of it has been seen.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the defaults."""
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict()
    config.model.dtype = "bfloat16"
    config.model.remat = "none"
    config.adapter = ml_collections.ConfigDict()
    config.adapter.method = "lora"
    config.adapter.rank = 16
    config.adapter.alpha = 32.0
    config.data = ml_collections.ConfigDict()
    config.data.max_length = 1024
    config.data.packing = True
    config.data.eval_fraction = 0.05
    config.train = ml_collections.ConfigDict()
    config.train.steps = 500
    config.train.batch_size = 16
    config.train.micro_batch_size = 1
    config.train.eval_every = 100
    config.train.save_every = 100
    config.train.log_every = 10
    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    return config
