"""What a decoder looks like, independent of where the description came from."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from mora_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The HuggingFace names of modules, those of a layer below `layer`.

    A norm whose name is None does not exist in the family. Matrices that are one tensor in files are one name here, and
    one target of adapters.

    Attributes:
        positions: the table of learned positions; None in families that rotate.
        head_tensor: the head's in files.
        qkv: of queries, keys and values, or the one that holds all three.
        by_head: whether that one holds a key/value head with its queries after the other, as parameters do; else all
            queries come first, then all keys, then all values.
        gate_up: of gate and up, or the one that holds both; of up alone where there is no gate.
        turned: whether matrices of layers are `[in, out]` in files (transformers' Conv1D), not `[out, in]`.
    """

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    final_norm: str = "model.norm"
    head: str = "lm_head"
    head_tensor: str = "lm_head.weight"
    layer: str = "model.layers.{layer}"
    attention_norm: str | None = "input_layernorm"
    post_attention_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    post_mlp_norm: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    by_head: bool = False
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    turned: bool = False


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The MLP of layers with experts, of which a router gives each token some.

    Attributes:
        layer: makes the module of all layers, `mora_jax.models.experts.Experts`; other models do without that file.
        count: experts a layer.
        per_token: how many of them compute a token.
        width: what an expert has in place of `intermediate_size`.
        normalize: whether the weights of a token's experts add up to 1; else they are those among all experts.
        router_bias, bias: whether the router and the experts have biases.
        limit: of gate (from above) and up (both ways); with it the gate is `gate · sigmoid(sigmoid_scale · gate)`, and
            up is counted from -1. None: gated by `activation`.
        router: the end of the router's path.
        path: that of the experts in files; an expert's number and name follow.
        names: of gate, up and down.
        fused: whether files hold all experts of a layer as one tensor `[E, in, out]`, gate and up of a feature
            side by side.
    """

    layer: Callable[..., Any]
    count: int
    per_token: int
    width: int
    normalize: bool = True
    router_bias: bool = False
    bias: bool = False
    limit: float | None = None
    sigmoid_scale: float = 1.702
    router: str = "mlp.gate"
    path: str = "mlp.experts"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    fused: bool = False


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that `Decoder` needs to know. Hashable, so that it can be part of a compiled function's key.

    Attributes:
        family: `model_type` of the family in `mora_jax.models.families` that it was read as.
        windows: for each layer, how many positions back it sees (the query's own included); None means all.
        ropes: the distinct rotary tables of the model.
        layer_ropes: for each layer, the index of its table in `ropes`.
        rotary_dim: how many numbers of a head rotate, the first ones; 0 where positions are learned.
        rotary_neighbours: whether the pairs (2j, 2j + 1) rotate, not (j, j + rotary_dim / 2).
        query_growth: (β, n): queries at position p are multiplied by 1 + β·log(1 + ⌊p / n⌋), or None.
        norm: "rms" or "layer", which also takes the mean away.
        norm_bias: whether norms have biases.
        norm_offset: what is added to every norm weight (1.0 in Gemma).
        qk_norm: "head" where each head of q and k has a norm, "all" where one norm goes over all heads, or None.
        gated: whether the MLP is `activation(gate) · up`, not `activation(up)`.
        parallel: whether attention and MLP of a layer have the same input.
        residual_scale: what attention and MLP are multiplied by before they are added.
        embedding_scale: what embeddings are multiplied by, rounded to the compute dtype first, or None.
        attention_scale: what the attention scores are multiplied by.
        attention_sinks: whether each head has a trained score that takes part in the softmax and gives nothing.
        experts: of layers that have them in place of an MLP; None where none has.
        logit_scale: what logits are multiplied by, before the cap. The final norm does it.
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
    rotary_dim: int
    rotary_neighbours: bool = False
    query_growth: tuple[float, int] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    norm: str = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0
    qk_norm: str | None = None
    gated: bool = True
    parallel: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    initializer_range: float = 0.02
    attention_sinks: bool = False
    experts: ExpertsConfig | None = None
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
