"""SmolLM2-1.7B, full fine-tuning on one TPU v5e-8 host: float32 masters and moments, sharded over the chips.

    pip install 'mora-jax[tpu]'
    mora-jax train --config configs/tpu_v5e_8_smollm2_1_7b_full.py \
        --config.model.path=HuggingFaceTB/SmolLM2-1.7B \
        --config.data.train=train.jsonl --config.out=runs/smollm2-1.7b_full

Needs 8 v5e chips (one VM, 16 GiB each). Planned, not measured (`mora-jax plan --config
configs/tpu_v5e_8_smollm2_1_7b_full.py --model smollm2-1.7b --accelerator v5e-8`, memory by formula): 11.4 of 16.9 GB on
each chip; 1.4 to 2.9 s a step, 5,600 to 12,100 tokens/s a chip, 0.4 to 0.8 hours in all. What it scores depends on the
data; no run of it has been seen.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the defaults."""
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict()
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.adapter = ml_collections.ConfigDict()
    config.adapter.method = "full"
    config.data = ml_collections.ConfigDict()
    config.data.max_length = 2048
    config.data.packing = True
    config.data.eval_fraction = 0.02
    config.train = ml_collections.ConfigDict()
    config.train.steps = 1000
    config.train.batch_size = 64
    config.train.micro_batch_size = 16
    config.train.eval_every = 100
    config.train.save_every = 200
    config.train.log_every = 10
    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.01
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = 4
    config.mesh.tensor = 2
    return config
