"""Named adapters on one model: every row as with its adapter alone, and nothing compiled again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.methods.mora import KINDS
from mora_jax.evaluation.generate import Generator
from mora_jax.interop import multi_adapter
from mora_jax.models import decoder, read_config
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.rules import Placement
from mora_jax.training.state import dotted
from tests.models.tiny import LLAMA, SIZES, fill_randomly, hf_folder, random_ids

GEMMA = SIZES | {
    "architectures": ["Gemma2ForCausalLM"],
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "sliding_window": 4,
    "attn_logit_softcapping": 5.0,
    "hidden_activation": "gelu_pytorch_tanh",
}
IDS = random_ids(4, 6)
BY_ROW = ["b", None, "a", "b"]
# One of several matrices with one input, twice, and one alone.
LORA = mj.LoRAConfig(rank=2, alpha=3.0, targets=("q_proj", "o_proj", "up_proj"))


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def base(config=LLAMA, dtype=jnp.float32):
    return decoder.Decoder(read_config(config, "config.json"), rngs=nnx.Rngs(0), dtype=dtype)


def tuned(config, seed, family=LLAMA, dtype=jnp.float32):
    model = base(family, dtype)
    mj.attach(model, config, rngs=nnx.Rngs(0))
    fill_randomly(model, seed)
    return model


def named_pair(first=LORA, second=LORA, family=LLAMA, dtype=jnp.float32, **options):
    """A collection with the adapters a and b, and the models with each of them alone, None for the base."""
    alone = {"a": tuned(first, 1, family, dtype), "b": tuned(second, 2, family, dtype), None: base(family, dtype)}
    named = mj.NamedAdapters(base(family, dtype), **options)
    named.add("a", alone["a"])
    named.add("b", alone["b"])
    return named, alone


def assert_rows(logits, alone, names=BY_ROW, atol=2e-5):
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        np.testing.assert_allclose(logits[jnp.asarray(rows)], alone[name](IDS)[jnp.asarray(rows)], atol=atol)


CASES = {
    "lora": (LORA, mj.RsLoRAConfig(rank=3, alpha=2.0, targets=("q_proj", "up_proj")), LLAMA),
    "lora by layer": (
        mj.LoRAConfig(rank=2, rank_pattern={"layers.1": 4}, alpha_pattern={"v_proj": 1.0}),
        mj.LoRAConfig(rank=3, targets=("v_proj", "o_proj"), layers_to_transform=(0, 2)),
        GEMMA,
    ),
    "pissa": (mj.PiSSAConfig(rank=2, targets=("o_proj",)), LORA, LLAMA),
    "rotation on gemma": (mj.MoRAConfig(rank=2, kind="rotation"),) * 2 + (GEMMA,),
} | {kind: (mj.MoRAConfig(rank=1, kind=kind),) * 2 + (LLAMA,) for kind in KINDS}
# The sums of every kind are tested without a model, too.
QUICK = ("lora", "sharing")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_each_row_is_as_with_its_adapter_alone(case):
    first, second, family = CASES[case]
    named, alone = named_pair(first, second, family)
    logits = named.model(IDS, adapter_ids=named.ids(BY_ROW))
    assert_rows(logits, alone)
    assert min(np.abs(logits[row] - alone[None](IDS)[row]).max() for row in (0, 2)) > 1e-2


@pytest.fixture(scope="module")
def pair():
    """The collection of two LoRAs that tests only read."""
    with jax.default_matmul_precision("highest"):
        return named_pair()


def test_switching_adding_and_deleting_compile_nothing():
    named, alone = named_pair()
    alone["c"] = tuned(mj.LoRAConfig(rank=1, alpha=1.0, targets=("o_proj",)), 3)
    expected = {name: model(IDS) for name, model in alone.items()}
    expected["d"] = expected["a"]

    def check(names):
        logits = named.model(IDS, adapter_ids=named.ids(names))
        for row, name in enumerate(names):
            np.testing.assert_allclose(logits[row], expected[name][row], atol=2e-5)

    check(BY_ROW)
    named.model(IDS)
    before = decoder._logits._cache_size()
    for name in ("b", None, "a"):
        named.set_active(name)
        assert named.active == name
        np.testing.assert_allclose(named.model(IDS), expected[name], atol=2e-5)
    named.add("c", alone["c"])
    check(["c", "b", None, "a"])
    named.delete("a")
    assert (named.names, named.active) == (("b", "c"), None)
    np.testing.assert_allclose(named.model(IDS), expected[None], atol=2e-5)
    named.add("d", alone["a"])
    check(["d", "b", "c", None])
    assert decoder._logits._cache_size() == before


def test_what_the_slots_have_no_room_for_makes_room():
    alone = {"a": tuned(LORA, 1), "b": tuned(LORA, 2), None: base()}
    alone["c"] = tuned(mj.LoRAConfig(rank=5, targets=("down_proj", "up_proj")), 3)
    named = mj.NamedAdapters(base(), slots=1)
    for name in ("a", "b"):
        named.add(name, alone[name])
    rows = named.ids(["b", "a"])
    named.set_active(["a", "a", "b", None])
    named.add("c", alone["c"])
    assert named.ids(["b", "a"]).tolist() == rows.tolist()
    assert_rows(named.model(IDS), alone, ["a", "a", "b", None])
    names = ["c", "b", "a", "c"]
    assert_rows(named.model(IDS, adapter_ids=named.ids(names)), alone, names)


def test_mixed_rows_generate_what_each_generates_alone(pair):
    named, alone = pair
    prompts = [row[:length].tolist() for row, length in zip(IDS, (6, 3, 5, 2), strict=True)]
    answers = Generator(named.model).batch(prompts, 10, adapter_ids=named.ids(BY_ROW))
    expected = [Generator(alone[name]).batch([prompt], 10)[0] for name, prompt in zip(BY_ROW, prompts, strict=True)]
    for answer, one in zip(answers, expected, strict=True):
        assert answer.tolist() == one.tolist()
    assert len({tuple(answer) for answer in answers}) == 4


def test_training_several_adapters_at_once(pair):
    """The gradient of a slot is that of the adapter alone on the slot's rows."""
    named, alone = pair

    def gradients(model, rows, ids=None):
        graphdef, adapters, frozen = mj.partition(model)

        def loss(adapters, rows):
            hidden = nnx.merge(graphdef, adapters, frozen).hidden(IDS, adapter_ids=ids)
            return jnp.sum(rows[:, None, None] * jnp.sin(hidden))

        return jax.jit(jax.grad(loss))(adapters, jnp.asarray(rows, jnp.float32))

    ids = named.ids(BY_ROW)
    together = dict(nnx.to_flat_state(gradients(named.model, [1, 1, 1, 1], ids)))
    for name, rows in {"a": [0, 0, 1, 0], "b": [1, 0, 0, 1]}.items():
        slot = int(named.ids([name])[0])
        for path, value in nnx.to_flat_state(gradients(alone[name], rows)):
            np.testing.assert_allclose(together[path][:, slot], value[...], atol=2e-4, rtol=2e-3)
    free = next(slot for slot in range(4) if slot not in ids)
    assert not any(np.asarray(value[:, free]).any() for value in together.values())


def test_rows_on_a_mesh_that_cuts_the_base(pair):
    named, _ = pair
    ids = named.ids(BY_ROW)
    graphdef, state = nnx.split(named.model)
    placement = Placement.of(make_mesh(1, 2, 2), state)
    places = placement.table(state)
    leaves, tree = jax.tree.flatten(state)
    names = [dotted(path) for path, _ in nnx.to_flat_state(state)]
    placed = [jax.device_put(leaf, places[name]) for name, leaf in zip(names, leaves, strict=True)]
    model = nnx.merge(graphdef, jax.tree.unflatten(tree, placed))
    np.testing.assert_allclose(
        model(IDS, adapter_ids=ids, partitioner=placement), named.model(IDS, adapter_ids=ids), atol=1e-4
    )


@pytest.mark.slow
def test_bfloat16():
    named, alone = named_pair(dtype=jnp.bfloat16)
    logits = named.model(IDS, adapter_ids=named.ids(BY_ROW))
    assert_rows(logits, alone, atol=0.3)
    assert np.abs(logits - alone[None](IDS)).max() > 1.0


def test_folders_in_and_out(pair, tmp_path):
    config = mj.LoRAConfig(rank=4, alpha=6.0, rank_pattern={"q_proj": 2})
    model = tuned(config, 5)
    mj.save_adapter(model, tmp_path / "poet")
    path = tmp_path / "poet" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_a_newer_peft": 1}))
    named = mj.NamedAdapters(base(), rank=8)
    with pytest.warns(UserWarning, match="of_a_newer_peft"):
        assert named.load(tmp_path / "poet") == "poet"
    with pytest.warns(UserWarning, match="of_a_newer_peft"):
        named.load(tmp_path / "poet", "other")
    named.add("small", tuned(mj.LoRAConfig(rank=1), 6))
    named.save("other", tmp_path / "again")
    written = [json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("poet", "again")]
    assert written[0] == written[1]
    with pytest.raises(ValueError, match="several named adapters"):
        mj.save_adapter(named.model, tmp_path / "no")
    named.keep("other")
    assert named.names == ()
    entries = [{entry.path: entry for entry in adapters_of(one)} for one in (named.model, model)]
    assert entries[0].keys() == entries[1].keys()
    for entry, other in zip(entries[0].values(), entries[1].values(), strict=True):
        for name, array in other.params.items():
            np.testing.assert_array_equal(entry.params[name], array)


class Owned(nnx.Module):
    """Somebody's own model."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(5, 6, rngs=rngs)
        self.second = nnx.Einsum("btd,do->bto", (6, 4), (4,), rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def test_somebody_elses_model():
    alone = {name: Owned() for name in ("a", "b", None)}
    for seed, name in enumerate(("a", "b")):
        mj.attach(alone[name], mj.LoRAConfig(rank=2, alpha=3.0), rngs=nnx.Rngs(0))
        fill_randomly(alone[name], seed, 0.5)
    named = mj.NamedAdapters(Owned())
    named.add("a", alone["a"])
    named.add("b", alone["b"])
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    named.set_active(BY_ROW)
    y = named.model(x)
    for row, name in enumerate(BY_ROW):
        np.testing.assert_allclose(y[row], alone[name](x)[row], atol=1e-5)
    named.set_active("b")
    np.testing.assert_allclose(named.model(x), alone["b"](x), atol=1e-5)
    named.add_weighted("mix", {"a": 0.5, "b": -2.0}, "cat")
    named.merge("mix")
    expected = Owned()
    for name in ("first", "second"):
        ours = getattr(named.model, name)
        assert type(ours) is type(getattr(expected, name))
        change = np.asarray(ours.kernel[...] - getattr(expected, name).kernel[...])
        deltas = [np.asarray(getattr(alone[one], name).adapter.delta_weight()) for one in ("a", "b")]
        np.testing.assert_allclose(change.reshape(deltas[0].shape), 0.5 * deltas[0] - 2.0 * deltas[1], atol=1e-5)


def test_refusals(pair, tmp_path):
    named, alone = pair
    mj.save_adapter(alone["a"], tmp_path / "a")
    with pytest.raises(mj.InputError, match="there is an adapter 'a' already"):
        named.load(tmp_path / "a")
    with pytest.raises(mj.InputError, match="there is no adapter 'x'; there are a, b"):
        named.set_active("x")
    for config, words in (
        (mj.MoRAConfig(), "a is LoRA, x is MoRA of kind sharing: only adapters of one method"),
        (mj.DoRAConfig(), "has DoRA's magnitude"),
        (mj.IA3Config(), "has ia3, but only LoRA and MoRA"),
        (mj.LoRAConfig(targets=("embed_tokens",)), "is a table that all rows share"),
        (mj.LoRAConfig(modules_to_save="lm_head"), "trains modules whole"),
    ):
        with pytest.raises(mj.InputError, match=words):
            named.add("x", tuned(config, 3))
    with pytest.raises(mj.InputError, match="the model has no adapter"):
        named.add("x", base())
    assert named.names == ("a", "b")
    with pytest.raises(ValueError, match=r"must be integers \[4\], one for each row, not int32 \[2\]"):
        named.model(IDS, adapter_ids=named.ids(["a", "b"]))
    named.set_active(["a", "b"])
    with pytest.raises(ValueError, match="active for 2 rows, but the batch has 4"):
        named.model(IDS)
    named.set_active(None)
    with pytest.raises(ValueError, match="this one has none"):
        base()(IDS, adapter_ids=[0, 0, 0, 0])
    with pytest.raises(mj.InputError, match="carries an adapter already"):
        mj.NamedAdapters(alone["a"])
    squares = mj.NamedAdapters(base())
    squares.add("one", tuned(mj.MoRAConfig(rank=1), 1))
    with pytest.raises(mj.InputError, match="sides 9 and 13; a square can't be padded"):
        squares.add("two", tuned(mj.MoRAConfig(rank=2), 1))


def q_only(kind, **settings):
    return kind(rank=2, targets=("q_proj",), **settings)


@pytest.mark.parametrize(
    "first, second, combination",
    [(q_only(mj.LoRAConfig, dropout=0.1), q_only(mj.LoRAConfig, dropout=0.2), how) for how in ("cat", "svd", "linear")]
    + [(q_only(mj.MoRAConfig, dropout=0.1), q_only(mj.MoRAConfig, dropout=0.2), "sum")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_combinations_of_several_dropouts_and_layers_can_be_kept(tmp_path, first, second, combination):
    layers = [dataclasses.replace(config, layers_to_transform=on) for config, on in ((first, (0, 1)), (second, (1,)))]
    named, _ = named_pair(*layers)
    named.add_weighted("mix", {"a": 0.7, "b": 0.3}, combination)
    named.set_active("mix")
    expected = named.model(IDS)
    named.save("mix", tmp_path / "mix")
    named.keep("mix")
    np.testing.assert_allclose(named.model(IDS), expected, atol=1e-5)
    entries = list(adapters_of(named.model))
    assert [entry.path.split(".")[2] for entry in entries] == ["0", "1"]
    assert {entry.config.dropout for entry in entries} == {0.2}


def test_what_cant_be_merged_leaves_every_adapter(monkeypatch):
    named, alone = named_pair()

    def refused(*_):
        raise ValueError("the base can't take it")

    monkeypatch.setattr(multi_adapter, "merge", refused)
    with pytest.raises(mj.InputError, match="the base can't take it"):
        named.merge("b")
    monkeypatch.setattr(multi_adapter, "install", refused)
    with pytest.raises(ValueError, match="the base can't take it"):
        named.keep("b")
    assert named.names == ("a", "b") and named.active == "a"
    assert_rows(named.model(IDS, adapter_ids=named.ids(BY_ROW)), alone)
    named.set_active("b")
    assert_rows(named.model(IDS), alone, ["b"] * len(IDS))


def test_a_quantised_base_keeps_its_adapters(tmp_path):
    folder = hf_folder(tmp_path / "base")
    named = mj.NamedAdapters(mj.load_pretrained(folder, quantize="int8", dtype="float32")[0])
    for name, seed in (("a", 1), ("b", 2)):
        named.add(name, tuned(LORA, seed))
    expected = named.model(IDS, adapter_ids=named.ids(BY_ROW))
    with pytest.raises(mj.InputError, match="the model's kernels are quantised"):
        named.merge("a")
    np.testing.assert_array_equal(named.model(IDS, adapter_ids=named.ids(BY_ROW)), expected)
