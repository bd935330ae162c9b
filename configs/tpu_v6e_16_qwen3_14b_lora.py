"""Qwen3-14B with LoRA rank 16 and rows of 4096 tokens on a TPU v6e-16 slice: four hosts of four chips.

    pip install 'mora-jax[tpu]'
    mora-jax train --config configs/tpu_v6e_16_qwen3_14b_lora.py \
        --config.model.path=Qwen/Qwen3-14B \
        --config.data.train=train.jsonl --config.out=runs/qwen3-14b_lora

Needs 16 v6e chips (32 GiB each). Every host runs the same command (docs/tpu_vms.md). Planned, not measured (`mora-jax
plan --config configs/tpu_v6e_16_qwen3_14b_lora.py --model qwen3-14b --accelerator v6e-16`, memory by formula): 24.4 of
34.1 GB on each chip; 1.7 to 3.9 s a step, 4,200 to 9,900 tokens/s a chip, 0.5 to 1.1 hours in all. What it scores
depends on the data; no run of it has been seen.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the defaults."""
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict()
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.adapter = ml_collections.ConfigDict()
    config.adapter.method = "lora"
    config.adapter.rank = 16
    config.adapter.alpha = 32.0
    config.data = ml_collections.ConfigDict()
    config.data.max_length = 4096
    config.data.packing = True
    config.data.eval_fraction = 0.02
    config.train = ml_collections.ConfigDict()
    config.train.steps = 1000
    config.train.batch_size = 64
    config.train.micro_batch_size = 16
    config.train.eval_every = 100
    config.train.save_every = 100
    config.train.log_every = 10
    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 30
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = 16
    config.mesh.tensor = 1
    return config
