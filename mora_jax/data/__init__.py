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

from mora_jax.data.batch_plan import BatchPlan as BatchPlan
from mora_jax.data.conversation import (
    Conversation as Conversation,
    Message as Message,
    Passage as Passage,
    Row as Row,
    TokenRow as TokenRow,
)
from mora_jax.data.dataset import EncodedDataset as EncodedDataset, Example as Example, split_rows as split_rows
from mora_jax.data.formats.column_mapping import Mapping as Mapping
from mora_jax.data.formats.load import (
    Rows as Rows,
    RowStream as RowStream,
    load_rows as load_rows,
    open_rows as open_rows,
)
from mora_jax.data.formats.registry import FORMATS as FORMATS
from mora_jax.data.inspect.advice import Advice as Advice, advise as advise, advise_on as advise_on
from mora_jax.data.inspect.report import Report as Report
from mora_jax.data.inspect.views import (
    describe_batch as describe_batch,
    describe_example as describe_example,
    inspect_data as inspect_data,
    inspect_dataset as inspect_dataset,
    make_page as make_page,
    token_texts as token_texts,
)
from mora_jax.data.loss_weights import MODES as MODES, LossWeights as LossWeights, token_weights as token_weights
from mora_jax.data.segments import Piece as Piece, Rendered as Rendered, Segment as Segment
from mora_jax.data.sources import Source as Source
from mora_jax.data.templates.builtin import TEMPLATES as TEMPLATES
from mora_jax.data.templates.render import Prompt as Prompt, Renderer as Renderer, render_prompt as render_prompt
from mora_jax.data.tokens.encode import RowEncoder as RowEncoder
from mora_jax.data.tokens.tokenize import Tokens as Tokens, load_tokenizer as load_tokenizer, tokenize as tokenize
