"""Qwen3-8B with MoRA on one H100: the sharing kind at the parameter count of LoRA rank 8.

    pip install 'mora-jax[cuda]'
    mora-jax train --config configs/gpu_h100_qwen3_8b_mora.py \
        --config.model.path=Qwen/Qwen3-8B \
        --config.data.train=train.jsonl --config.out=runs/qwen3-8b_mora

Needs one GPU of 80 GB. Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.92: XLA takes three quarters of the memory otherwise.
Planned, not measured (`mora-jax plan --config configs/gpu_h100_qwen3_8b_mora.py --model qwen3-8b --accelerator h100`,
memory by formula): 25.2 of 79.0 GB on each chip; 1.6 to 2.7 s a step, 12,000 to 20,900 tokens/s a chip, 0.4 to 0.8
hours in all. What it scores depends on the data; no run of it has been seen.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the defaults."""
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict()
    config.model.dtype = "bfloat16"
    config.model.remat = "none"
    config.adapter = ml_collections.ConfigDict()
    config.adapter.method = "mora"
    config.adapter.kind = "sharing"
    config.adapter.rank = 8
    config.data = ml_collections.ConfigDict()
    config.data.max_length = 2048
    config.data.packing = True
    config.data.eval_fraction = 0.02
    config.train = ml_collections.ConfigDict()
    config.train.steps = 1000
    config.train.batch_size = 16
    config.train.micro_batch_size = 1
    config.train.eval_every = 100
    config.train.save_every = 100
    config.train.log_every = 10
    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 30
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    return config
