"""Llama-3-8B with LoRA rank 16 and rows of 4096 tokens on a host of eight H100: data parallel, one base on each.

    pip install 'mora-jax[cuda]'
    mora-jax train --config configs/gpu_h100x8_llama3_8b_lora.py \
        --config.model.path=meta-llama/Meta-Llama-3-8B-Instruct \
        --config.data.train=train.jsonl --config.out=runs/llama3-8b_lora

Needs eight GPUs of 80 GB with NVLink. Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.92: XLA takes three quarters of the memory
otherwise. Planned, not measured (`mora-jax plan --config configs/gpu_h100x8_llama3_8b_lora.py --model llama3-8b
--accelerator h100x8`, memory by formula): 37.8 of 79.0 GB on each chip; 1.6 to 2.9 s a step, 11,400 to 20,000 tokens/s
a chip, 0.5 to 0.8 hours in all. What it scores depends on the data; no run of it has been seen.
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
    config.data.max_length = 4096
    config.data.packing = True
    config.data.eval_fraction = 0.02
    config.train = ml_collections.ConfigDict()
    config.train.steps = 1000
    config.train.batch_size = 64
    config.train.micro_batch_size = 8
    config.train.eval_every = 100
    config.train.save_every = 100
    config.train.log_every = 10
    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 30
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 8
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    return config
