"""A vocabulary grown by added tokens: rows of the embedding and of the output head, and the tokenizer's own list."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mora_jax.adapters.sites import adapted_sites
from mora_jax.errors import InputError
from mora_jax.models.decoder import Decoder


def add_tokens(model: Decoder, tokenizer: Any, tokens: Sequence[str], *, multiple: int = 8) -> tuple[int, ...]:
    """Adds tokens to a tokenizer and, where the table has no rows for them, to the model, in place.

    New rows of the embedding, of that for the layers' own inputs, and of an untied head are the mean of those that
    were there, as far as they are tokens.
    Train them with `trainable_tokens=` of a configuration; the same call on the base comes before `load_adapter` of
    what was trained so. `save_pretrained` writes the grown model and tokenizer.

    Args:
        model: without adapters.
        tokenizer: of transformers; it is changed, too.
        tokens: texts of the new tokens.
        multiple: the number of rows is padded to a multiple of this.

    Returns:
        Their ids, in order.

    Raises:
        InputError: a token is there already or twice, or the model has adapters.

    Examples:
        >>> import mora_jax as mj
        >>> from mora_jax import demo
        >>> model, tokenizer = mj.load_pretrained(demo.model_path(), dtype="float32")
        >>> new = mj.add_tokens(model, tokenizer, ["<tool>", "</tool>"])
        >>> tokenizer.convert_ids_to_tokens(new)
        ['<tool>', '</tool>']
        >>> config = mj.LoRAConfig(rank=2, trainable_tokens=new)
    """
    known = tokenizer.get_vocab()
    if isinstance(tokens, str) or not tokens or not all(isinstance(token, str) and token for token in tokens):
        raise InputError(f"tokens must be a list of texts, not {tokens!r}")
    if there := [token for token in tokens if token in known]:
        raise InputError(f"the tokenizer has the token {there[0]!r} already, as {known[there[0]]}: leave it out")
    if doubled := [token for token in tokens if list(tokens).count(token) > 1]:
        raise InputError(f"the token {doubled[0]!r} is given twice")
    if adapted_sites(model):
        raise InputError("the model carries adapters: add tokens first, then attach or load them")
    used = max(known.values(), default=-1) + 1
    tokenizer.add_tokens(list(tokens))
    ids = tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
    rows = model.config.vocab_size
    embeddings = [model.embed_tokens] + ([] if model.layer_inputs is None else [model.layer_inputs.table])
    if max(ids) >= rows:
        total = -(-(max(ids) + 1) // multiple) * multiple
        source, sizes = model.config.hf_config, {"vocab_size": total}
        if model.layer_inputs is not None:
            sizes["vocab_size_per_layer_input"] = total
        # A model with images says it of its text part.
        grown = {"text_config": source["text_config"] | sizes} if "text_config" in source else sizes
        model.config = dataclasses.replace(model.config, vocab_size=total, source=json.dumps(source | grown))
        for embedding in embeddings:
            embedding.num_embeddings = total
    tables = [embedding.embedding for embedding in embeddings] + (
        [] if model.lm_head is None else [model.lm_head.kernel]
    )
    for variable in tables:
        table = variable.get_value()
        mean = jnp.mean(table[: min(used, rows)].astype(jnp.float32), axis=0)
        more = jnp.broadcast_to(mean, (model.config.vocab_size - rows, table.shape[1])).astype(table.dtype)
        table = jnp.concatenate([table, more])
        variable.set_value(table.at[jnp.array(ids)].set(mean.astype(table.dtype)))
    model.added_tokens += tuple(tokens)
    return ids
