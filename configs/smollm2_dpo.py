"""SmolLM2-135M-Instruct on pairs of answers: DPO with LoRA rank 8 on every linear layer, a tenth of the pairs held out.

    mora-jax train --config configs/smollm2_dpo.py --config.model.path=HuggingFaceTB/SmolLM2-135M-Instruct \
        --config.data.train=pairs.json --config.out=runs/smollm2_dpo

Compare objectives and methods by adding, for example, --config.loss.objective=orpo, or --config.adapter.method=mora
--config.adapter.kind=rotation, and another --config.out.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the defaults."""
    config = ml_collections.ConfigDict()
    config.loss = ml_collections.ConfigDict()
    config.loss.objective = "dpo"
    config.loss.beta = 0.1
    config.data = ml_collections.ConfigDict()
    config.data.max_length = 1024
    config.data.eval_fraction = 0.1
    config.train = ml_collections.ConfigDict()
    config.train.steps = 60
    config.train.batch_size = 4
    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = 6
    return config
