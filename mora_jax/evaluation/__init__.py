"""What a model does: generation with a key/value cache, and scores over a data set."""

from mora_jax.evaluation.chat import generate_batch as generate_batch, stream_text as stream_text
from mora_jax.evaluation.generate import Generator as Generator, Sampling as Sampling
from mora_jax.evaluation.loglikelihood import Loglikelihood as Loglikelihood, LoglikelihoodScorer as LoglikelihoodScorer
