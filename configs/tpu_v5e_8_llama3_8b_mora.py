"""Llama-3-8B with MoRA on one TPU v5e-8 host: the rotation kind at the parameter count of LoRA rank 8.

    pip install 'mora-jax[tpu]'
    mora-jax train --config configs/tpu_v5e_8_llama3_8b_mora.py \
        --config.model.path=meta-llama/Meta-Llama-3-8B-Instruct \
        --config.data.train=train.jsonl --config.out=runs/llama3-8b_mora

Needs 8 v5e chips (one VM, 16 GiB each). Planned, not measured (`mora-jax plan --config
configs/tpu_v5e_8_llama3_8b_mora.py --model llama3-8b --accelerator v5e-8`, memory and collectives by the TPU's
compiler): 12.3 of 16.9 GB on each chip; 4.1 to 8.9 s a step, 1,800 to 4,000 tokens/s a chip, 1.1 to 2.5 hours in all.
What it scores depends on the data; no run of it has been seen.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the defaults."""
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict()
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.adapter = ml_collections.ConfigDict()
    config.adapter.method = "mora"
    config.adapter.kind = "rotation"
    config.adapter.rank = 8
    config.data = ml_collections.ConfigDict()
    config.data.max_length = 2048
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
    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 30
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 2
    config.mesh.fsdp = 4
    config.mesh.tensor = 1
    return config
