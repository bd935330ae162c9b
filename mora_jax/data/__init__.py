"""Data: files to conversations, to rendered text, to tokens with weights, to batches.

Knows no model and imports no jax; `mora_jax.data.pipeline`, whose grain does, has to be imported by that name.

Step by step, each value printable:

    rows = load_rows("dolly.json")                              # conversations
    rendered = Renderer(tokenizer).render(rows[0])              # text, and what each stretch of it is
    [tokens] = tokenize([rendered], tokenizer)                  # ids, segments and turns
    weights = token_weights(tokens, LossWeights("masked"))      # what each prediction counts
    dataset = EncodedDataset.build(rows, tokenizer)             # all of it for all rows
    plan = BatchPlan(dataset.lengths, batch_size=4, seed=0, steps=50)
    batch = dataset.batch(plan.rows(0))                         # see describe_batch
"""

from mora_jax.data.batch_plan import BatchPlan
from mora_jax.data.conversation import Conversation, Message, Passage, Row, TokenRow
from mora_jax.data.dataset import EncodedDataset, Example, split_rows
from mora_jax.data.formats.column_mapping import Mapping
from mora_jax.data.formats.load import Rows, RowStream, load_rows, open_rows
from mora_jax.data.formats.registry import FORMATS
from mora_jax.data.inspect.advice import Advice, advise, advise_on
from mora_jax.data.inspect.report import Report
from mora_jax.data.inspect.views import (
    describe_batch,
    describe_example,
    inspect_data,
    inspect_dataset,
    make_page,
    token_texts,
)
from mora_jax.data.loss_weights import MODES, LossWeights, token_weights
from mora_jax.data.segments import Piece, Rendered, Segment
from mora_jax.data.sources import Source
from mora_jax.data.templates.builtin import TEMPLATES
from mora_jax.data.templates.render import Prompt, Renderer, render_prompt
from mora_jax.data.tokens.encode import RowEncoder
from mora_jax.data.tokens.tokenize import Tokens, load_tokenizer, tokenize

__all__ = [
    "Advice",
    "BatchPlan",
    "Conversation",
    "EncodedDataset",
    "Example",
    "FORMATS",
    "LossWeights",
    "MODES",
    "Mapping",
    "Message",
    "Passage",
    "Piece",
    "Prompt",
    "Rendered",
    "Renderer",
    "Report",
    "Row",
    "RowEncoder",
    "RowStream",
    "Rows",
    "Segment",
    "Source",
    "TEMPLATES",
    "TokenRow",
    "Tokens",
    "advise",
    "advise_on",
    "describe_batch",
    "describe_example",
    "inspect_data",
    "inspect_dataset",
    "load_rows",
    "load_tokenizer",
    "make_page",
    "open_rows",
    "render_prompt",
    "split_rows",
    "token_texts",
    "token_weights",
    "tokenize",
]
