"""Losses over the vocabulary, masked, unmasked or weighted, and what a step divides them by.

Every token has a weight. `weighted_loss` takes hidden states and an output head, and never makes the logits of a whole
batch; `weighted_loss_of_logits` takes logits.
"""

from mora_jax.losses.cross_entropy import next_token_targets as next_token_targets
from mora_jax.losses.cross_entropy import normalized as normalized
from mora_jax.losses.cross_entropy import token_weights as token_weights
from mora_jax.losses.cross_entropy import weighted_loss as weighted_loss
from mora_jax.losses.cross_entropy import weighted_loss_of_logits as weighted_loss_of_logits
