"""What is known of the rank and the learning rate that a method needs, a line each, with where it comes from."""

from __future__ import annotations

from mora_jax.data.inspect.advice import BITS_A_PARAMETER, BITS_A_TOKEN, EVIDENCE, bits_to_learn, smallest_rank
from mora_jax.planning.plan import Plan
from mora_jax.training.config.adapter import adapter_config

_MEASURED = "on the embedded model, in 64 steps (docs/studies/rates)"
#: By method: how its best rates lay to those of others.
_RATES = {
    "lora": f"the best rates of LoRA with alpha 32 were about 10 times full fine-tuning's, by {EVIDENCE}, and 2.6 to 3 "
    f"times {_MEASURED}, ranks 1 to 16",
    "full": f"the best rates of full fine-tuning were about a tenth of LoRA's, by {EVIDENCE}, and a third {_MEASURED}",
    "mora": "the best rates of MoRA were 0.8 to 1.1 times those of LoRA with alpha 32, but of rotation at rank 4 three "
    f"times, {_MEASURED}; nothing is published",
}


def hints(plan: Plan) -> tuple[str, ...]:
    """The lines for a plan: what its parameters can hold, and the method's learning rate."""
    method = plan.config.adapter.method
    lines = [f"capacity: {_capacity(plan)}"]
    if method in _RATES:
        lines.append(f"learning rate: {_RATES[method]}")
    return tuple(lines)


def _capacity(plan: Plan) -> str:
    held = BITS_A_PARAMETER * plan.trainable / BITS_A_TOKEN
    words = (
        f"{plan.trainable:,} trained parameters hold what about {held:,.0f} trained tokens can teach "
        f"({BITS_A_PARAMETER:g} bits a parameter, {BITS_A_TOKEN:g} a token)"
    )
    steps = plan.config.train.steps
    if steps is not None and plan.config.adapter.config_class.grows_with_rank:
        tokens = steps * plan.tokens
        rank = smallest_rank(bits_to_learn(tokens), plan.trainable / adapter_config(plan.config.adapter, steps).rank)
        words += f"; rank {rank} would hold all {tokens:,} tokens of the run, if each was new and trained"
    return f"{words}: an upper bound for what is needed, by {EVIDENCE}"
