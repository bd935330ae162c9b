"""Llama-3-70B with LoRA rank 16 on a TPU v5p-64 slice: 32 chips on 8 hosts (the number in the name counts
TensorCores).

    pip install 'mora-jax[tpu]'
    mora-jax train --config configs/tpu_v5p_64_llama3_70b_lora.py \
        --config.model.path=meta-llama/Meta-Llama-3-70B-Instruct \
        --config.data.train=train.jsonl --config.out=runs/llama3-70b_lora

Needs 32 v5p chips (95 GiB each). Every host runs the same command (docs/tpu_vms.md). Planned, not measured (`mora-jax
plan --config configs/tpu_v5p_64_llama3_70b_lora.py --model llama3-70b --accelerator v5p-64`, memory by formula): 73.0
of 101.7 GB on each chip; 3.8 to 7.5 s a step, 550 to 1,100 tokens/s a chip, 1.0 to 2.1 hours in all. What it scores
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
    config.data.max_length = 2048
    config.data.packing = True
    config.data.eval_fraction = 0.02
    config.train = ml_collections.ConfigDict()
    config.train.steps = 1000
    config.train.batch_size = 64
    config.train.micro_batch_size = 64
    config.train.eval_every = 100
    config.train.save_every = 50
    config.train.log_every = 10
    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 30
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = 32
    config.mesh.tensor = 1
    return config
