"""Llama-3-8B with MoRA on a TPU VM: the rotation kind at the parameter count of LoRA rank 8, bfloat16.

    pip install 'mora-jax[tpu]'
    mora-jax train --config configs/tpu_llama3_8b_mora.py --config.model.path=meta-llama/Meta-Llama-3-8B-Instruct \
        --config.data.train=train.jsonl --config.out=runs/llama3_8b_mora

Data parallel over the chips of one host: each chip holds the whole base model in bfloat16 (16 GB), so a chip needs
32 GB or more (v4, v5p, v6e; not v5e). Not measured yet: expect nothing of its speed or scores before you have.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the defaults."""
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict()
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.adapter = ml_collections.ConfigDict()
    config.adapter.method = "mora"
    config.adapter.kind = "rotation"
    config.adapter.rank = 8
    config.data = ml_collections.ConfigDict()
    config.data.max_length = 2048
    config.data.eval_fraction = 0.02
    config.train = ml_collections.ConfigDict()
    config.train.epochs = 1
    config.train.batch_size = 32
    config.train.micro_batch_size = 8
    config.train.eval_every = 100
    config.train.save_every = 100
    config.train.log_every = 10
    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "cosine"
    return config
