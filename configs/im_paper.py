"""Instruction Modelling as its released code trained (Shi et al., NeurIPS 2024, arXiv 2405.14394, section 4.1).

    mora-jax train --config configs/im_paper.py --config.model.path=Llama-2-7b-hf \
        --config.data.train=lima.jsonl --config.out=runs/im

Loss on every token but the first, each example divided by its own number of tokens: the release means to leave template
tokens out, but its search for them finds the first header only. `--config.loss.mode=unmasked
--config.loss.normalize=example` is the method as the paper defines it, `--config.loss.mode=masked
--config.loss.normalize=example` the paper's baseline. The paper's AdamW has betas 0.9 and 0.98 and epsilon 1e-6, which
are not set here, and its warm-up takes 3 % of the steps: set `optimizer.warmup_steps` when you know them. The paper's
results are single runs of full fine-tuning of 7B and 13B models on GPUs; nothing of that size was run here.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the defaults."""
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict()
    config.model.remat = "full"
    config.adapter = ml_collections.ConfigDict()
    config.adapter.method = "full"
    config.data = ml_collections.ConfigDict()
    config.data.template = "tulu"
    config.data.max_length = 2048
    config.loss = ml_collections.ConfigDict()
    config.loss.mode = "im_paper"
    config.train = ml_collections.ConfigDict()
    config.train.epochs = 2
    config.train.batch_size = 128
    config.train.micro_batch_size = 8
    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "linear"
    return config
