"""What a decoder looks like, independent of where the description came from."""

import dataclasses
import json
from typing import Any

from mora_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The HuggingFace names of the tensors that a family may name differently.

    Projections are always `self_attn.{q,k,v,o}_proj` and `mlp.{gate,up,down}_proj` below `layer`. A norm
    whose name is None does not exist in the family.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{layer}"
    attention_norm: str = "input_layernorm"
    post_attention_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    post_mlp_norm: str | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that `Decoder` needs to know. Hashable, so that it can be part of a compiled function's key.

    Attributes:
        family: `model_type` of the family in `mora_jax.models.families` that it was read as.
        windows: for each layer, how many positions back it sees (the query's own included); None means all.
        ropes: the distinct rotary tables of the model.
        layer_ropes: for each layer, the index of its table in `ropes`.
        norm_offset: what is added to every norm weight (1.0 in Gemma).
        embedding_scale: what embeddings are multiplied by, rounded to the compute dtype first, or None.
        attention_scale: what the attention scores are multiplied by.
        source: the HuggingFace `config.json` it was read from, as JSON text; `save_pretrained` writes it.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    tie_embeddings: bool
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    layer_ropes: tuple[int, ...]
    attention_scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    initializer_range: float = 0.02
    names: TensorNames = TensorNames()
    source: str = dataclasses.field(default="{}", repr=False)

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def hf_config(self) -> dict[str, Any]:
        """A fresh copy of the HuggingFace `config.json` this was read from."""
        return json.loads(self.source)
