"""SmolLM2-135M-Instruct on AlpaGasus-Dolly 3k: LoRA rank 8 on every linear layer, loss on the responses.

    mora-jax train --config configs/smollm2_dolly.py --config.model.path=HuggingFaceTB/SmolLM2-135M-Instruct \
        --config.data.train=alpagasus_dolly_3k.json --config.out=runs/smollm2_dolly

Compare methods and losses by adding, for example, --config.adapter.method=mora --config.adapter.kind=rotation, or
--config.loss.mode=unmasked, and another --config.out.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the defaults."""
    config = ml_collections.ConfigDict()
    config.data = ml_collections.ConfigDict()
    config.data.max_length = 512
    config.data.eval_fraction = 0.05
    config.train = ml_collections.ConfigDict()
    config.train.steps = 60
    config.train.batch_size = 4
    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 2e-4
    return config
