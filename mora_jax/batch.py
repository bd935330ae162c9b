"""What a batch holds: the keys, shapes and dtypes that data makes, the step trains on and evaluation scores."""

from typing import Any, NotRequired, TypedDict

Array = Any  # of numpy on the host, of jax on the devices


class Batch(TypedDict):
    """Rows of tokens. B stands for the rows: `[rows]` of a data set, `[micro-batches, rows]` in a training step.

    Attributes:
        input_ids: int32 `[B, T]`, the tokens; 0 at padding.
        segment_ids: int32 `[B, T]`, the number of each token's example in its row, from 1; 0 is padding.
        weights: float32 `[B, T]`, of predicting token t from those before it. Those of padding and of an example's
            first token count nothing.
        positions: int32 `[B, T]`, of the rotary angles; None: they restart with each example.
        counts: float32 `[B]`, what each row adds to the normaliser; without it the row's weights do.
        kl_weights: float32 `[B, T]`, of the divergence from the base in predicting token t.
        prompt_weights: float32 `[B, T]`, 1 at the tokens of instructions, which evaluation scores beside the others.
    """

    input_ids: Array
    segment_ids: Array
    weights: Array
    positions: NotRequired[Array]
    counts: NotRequired[Array]
    kl_weights: NotRequired[Array]
    prompt_weights: NotRequired[Array]


class PreferenceBatch(TypedDict):
    """Rows of preferences. B stands for the rows as in `Batch`, K for the most examples that share one.

    An example is two sequences, `[B, 2, T]`: with the chosen and the rejected answer of a pair, or with a labelled
    answer and with that of another example. Each has the number of its example in `segment_ids`.

    Attributes:
        input_ids, segment_ids, positions: int32 `[B, 2, T]`, as in `Batch`.
        weights: float32 `[B, 2, T]`, of the SFT term; of wanted answers alone.
        answer_weights: float32 `[B, 2, T]`, of each token in the log-probability of its answer.
        counts: float32 `[B]`, as in `Batch`, of the SFT term.
        example_weights: float32 `[B, K]`, what each example counts; 0 where there is none.
        desired: float32 `[B, K]`, 1 where the first answer is wanted, which that of a pair always is.
        reference_logps: float32 `[B, 2, K]`, the log-probabilities of the answers under the reference.
    """

    input_ids: Array
    segment_ids: Array
    positions: Array
    weights: Array
    answer_weights: Array
    counts: Array
    example_weights: Array
    desired: Array
    reference_logps: NotRequired[Array]
