"""What a decoder looks like, independent of where the description came from."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mora_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The HuggingFace names of modules, those of a layer below `layer`.

    A norm whose name is None does not exist in the family. Matrices that are one tensor in files are one name here, and
    one target of adapters.

    Attributes:
        positions: the table of learned positions; None in families that rotate.
        head_tensor: the head's in files that are written.
        qkv: of queries, keys and values, or the one that holds all three.
        by_head: whether that one holds a key/value head with its queries after the other, as parameters do; else all
            queries come first, then all keys, then all values.
        gate_up: of gate and up, or the one that holds both; of up alone where there is no gate.
        turned: whether matrices of layers are `[in, out]` in files (transformers' Conv1D), not `[out, in]`.
        layer_embedding, layer_inputs, layer_inputs_norm: of what makes the layers' own inputs.
        input_gate, input_out, input_norm: of what a layer does with its own.
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
    layer_embedding: str = "model.embed_tokens_per_layer"
    layer_inputs: str = "model.per_layer_model_projection"
    layer_inputs_norm: str = "model.per_layer_projection_norm"
    input_gate: str = "per_layer_input_gate"
    input_out: str = "per_layer_projection"
    input_norm: str = "post_per_layer_input_norm"


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The MLP of layers with experts, of which a router gives each token some.

    Attributes:
        layer: makes the module of all layers, `Experts` or `ExpertsBeside` of `mora_jax.models.experts`; other models
            do without that file.
        balance: how evenly experts are used, by the sums of a pass, `mora_jax.models.experts.balance`.
        count: experts a layer.
        per_token: how many of them compute a token.
        width: what an expert has in place of `intermediate_size`.
        normalize: whether the weights of a token's experts add up to 1; else they are those among all experts.
        router_bias, bias: whether the router and the experts have biases.
        limit: of gate (from above) and up (both ways); with it the gate is `gate · sigmoid(sigmoid_scale · gate)`, and
            up is counted from -1. None: gated by `activation`.
        router: the end of the router's path.
        router_scales: whether the router has a norm of its own, whose weight is divided by `√D`, and multiplies the
            weights of experts by stored numbers.
        path: that of an expert's matrix behind its layer's, which adapters have too.
        parameters: that of the experts in transformers.
        names: of gate, up and down.
        fused: how files hold all experts of a layer as one tensor: "interleaved", `[E, in, out]` with gate and up of a
            feature side by side, or "stacked", `[E, out, in]` with all of gate before all of up; None: they hold a
            tensor for each matrix of each expert.
        norms: where a dense MLP is beside the experts, the names of the norms before and behind it, then before and
            behind them; () where there is none.
    """

    layer: Callable[..., Any]
    balance: Callable[..., Any]
    count: int
    per_token: int
    width: int
    normalize: bool = True
    router_bias: bool = False
    bias: bool = False
    limit: float | None = None
    sigmoid_scale: float = 1.702
    router: str = "mlp.gate"
    router_scales: bool = False
    path: str = "mlp.experts.{expert}.{name}"
    parameters: str = "mlp.experts"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    fused: str | None = None
    norms: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """Linear attention by the gated delta rule, in place of attention.

    Attributes:
        layer: makes the module of all layers, `mora_jax.models.delta.GatedDelta`; other models do without that file.
        key_heads, value_heads: how many there are; a key head serves `value_heads / key_heads` value heads.
        key_dim, value_dim: numbers of a head.
        window: tokens that the convolution sees, the last one included.
        path: the end of the path of its parameters.
    """

    layer: Callable[..., Any]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    window: int
    path: str = "linear_attn"


@dataclasses.dataclass(frozen=True)
class LayerInputConfig:
    """Numbers of each token that every layer has as an input of its own, beside the residual stream.

    Attributes:
        model: makes the module that makes them, `mora_jax.models.layer_inputs.LayerInputs`; other models do without.
        layer: makes what all layers do with them, `LayerInput` there.
        width: numbers of a token for each layer.
    """

    model: Callable[..., Any]
    layer: Callable[..., Any]
    width: int


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
        attention_gate: whether what attention gives is multiplied by the sigmoid of a gate, which files hold behind the
            query of each head.
        delta: linear attention in place of attention; None for attention.
        value_norm: whether each head of v has a norm, without weights.
        values_are_keys: whether v is k before its norm and rotation, so that there is no matrix for it.
        keys_of: the number of the layer whose keys and values these layers use; None for their own.
        keys_used: the number of this layer where others use its keys and values, which makes it a stack of its own.
        layer_input: the inputs that every layer has for itself; None for none.
        layer_scale: whether what a layer gives is multiplied by a stored number.
        experts: of layers that have them in place of an MLP; None where none has.
        logit_scale: what logits are multiplied by, before the cap. The final norm does it.
        source: the HuggingFace `config.json` it was read from, as JSON text; `save_pretrained` writes it.
        differing: for each layer the names and values of the fields in which it differs from the model's, where layers
            are of several kinds; () where all are alike.
        numbers: of the layers that are described, where these are a part of a model's; () for all.
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
    attention_gate: bool = False
    delta: DeltaConfig | None = None
    value_norm: bool = False
    values_are_keys: bool = False
    keys_of: int | None = None
    keys_used: int | None = None
    layer_input: LayerInputConfig | None = None
    layer_scale: bool = False
    experts: ExpertsConfig | None = None
    names: TensorNames = TensorNames()
    source: str = dataclasses.field(default="{}", repr=False)
    differing: tuple[tuple[tuple[str, Any], ...], ...] = ()
    numbers: tuple[int, ...] = ()

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @functools.cached_property
    def runs(self) -> tuple[tuple["DecoderConfig", ...], ...]:
        """The stacks of like layers that the parameters of the layers are kept in.

        A run is executed by one loop, whose turn goes through a layer of each of its stacks: where three layers of one
        kind and one of another take turns, there is one run of four stacks. Of like layers there is one of one.
        """
        if not self.differing:
            return ((self,),)
        return tuple(
            tuple(self._stack(range(start + i, start + count * period, period)) for i in range(period))
            for start, period, count in _periods(self.differing)
        )

    @functools.cached_property
    def by_layer(self) -> tuple["DecoderConfig", ...]:
        """For each layer the stack that it is in."""
        stacks = [stack for run in self.runs for stack in run]
        numbers = {n: stack for stack in stacks for n in stack.numbers or range(self.num_layers)}
        return tuple(numbers[n] for n in range(self.num_layers))

    @property
    def has_states(self) -> bool:
        """Whether any layer has linear attention, whose state goes from token to token."""
        return any(stack.delta is not None for run in self.runs for stack in run)

    def _stack(self, numbers: Sequence[int]) -> "DecoderConfig":
        """Some of the layers, which are all of one kind."""
        return dataclasses.replace(
            self,
            **dict(self.differing[numbers[0]]),
            num_layers=len(numbers),
            windows=tuple(self.windows[i] for i in numbers),
            layer_ropes=tuple(self.layer_ropes[i] for i in numbers),
            differing=(),
            numbers=tuple(numbers),
        )

    @property
    def hf_config(self) -> dict[str, Any]:
        """A fresh copy of the HuggingFace `config.json` this was read from."""
        return json.loads(self.source)


def _periods(kinds: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    """Splits a sequence into stretches that repeat: where each starts, its period, and how often that comes."""
    start = 0
    while start < len(kinds):
        period, count = 1, 1
        for length in range(1, 17):
            pattern, times = kinds[start : start + length], 1
            while kinds[start + times * length : start + (times + 1) * length] == pattern:
                times += 1
            if times > 1 and times * length > period * count:
                period, count = length, times
        yield start, period, count
        start += period * count
