"""Adapters of models whose module paths are hard to tell apart, there and back, and in the real peft."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.config.patterns import pattern_for, targets_for, value_at
from mora_jax.errors import InputError
from tests.models.tiny import fill_randomly
from tests.peers import peft, torch

SIZE = 6
# Paths with one another's ends, numbers that begin alike, words of PEFT's own, words that expressions could mean.
PATHS = (
    "out",
    "block.out",
    "block.inner.out",
    "layers.1.proj",
    "layers.11.proj",
    "layersX1.proj",
    "nested.0.0.out",
    "nested.0.1.out",
    "nested.1.0.proj",
    "lora_A.proj",
    "default",
    "block.default",
    "block.base_layer",
    "w_+",
    "block.w_+",
    "w__",
    "1",
)
PEFTS = tuple(path for path in PATHS if path not in ("lora_A.proj", "block.base_layer"))
X = np.random.default_rng(0).normal(size=(3, SIZE)).astype(np.float32)


class Tree(nnx.Module):
    """One linear layer at each of some paths, used one after the other."""

    def __init__(self, paths=PATHS, seed: int = 0):
        rngs = nnx.Rngs(seed)
        tree: dict = {}
        for path in paths:
            *above, last = path.split(".")
            node = tree
            for name in above:
                node = node.setdefault(name, {})
            node[last] = nnx.Linear(SIZE, SIZE, rngs=rngs)
        for name, child in tree.items():
            setattr(self, name, _module(child))
        self.order = tuple(paths)

    def __call__(self, x):
        for path in self.order:
            node = self
            for name in path.split("."):
                if isinstance(node, nnx.List):
                    node = node[int(name)]
                else:
                    node = node[name] if isinstance(node, nnx.Dict) else getattr(node, name)
            x = x + jnp.tanh(node(x))
        return x


def _module(node):
    if not isinstance(node, dict):
        return node
    if all(name in node for name in map(str, range(len(node)))):
        return nnx.List([_module(node[str(i)]) for i in range(len(node))])
    return nnx.Dict({name: _module(child) for name, child in node.items()})


def torch_tree(model: Tree):
    """The same layers in torch."""

    class TorchTree(torch.nn.Module):
        def forward(self, x):
            for path in model.order:
                x = x + torch.tanh(self.get_submodule(path)(x))
            return x

    tree = TorchTree()
    flat = {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for path in model.order:
        *above, last = path.split(".")
        node = tree
        for name in above:
            if name not in node._modules:
                node.add_module(name, torch.nn.Module())
            node = node._modules[name]
        layer, where = torch.nn.Linear(SIZE, SIZE), path.replace(".", "/")
        layer.weight.data = torch.from_numpy(np.array(flat[f"{where}/kernel"][...]).T.copy())
        layer.bias.data = torch.from_numpy(np.array(flat[f"{where}/bias"][...]))
        node.add_module(last, layer)
    return tree


def adapted(config, paths=PATHS) -> Tree:
    model = Tree(paths)
    mj.attach(model, config, rngs=nnx.Rngs(1))
    fill_randomly(model)
    return model


def assert_returns(model: Tree, folder: Path) -> None:
    paths = model.order
    mj.save_adapter(model, folder)
    again = Tree(paths)
    mj.load_adapter(again, folder)
    expected = {entry.path: entry for entry in adapters_of(model)}
    found = {entry.path: entry for entry in adapters_of(again)}
    assert found.keys() == expected.keys()
    for path, entry in found.items():
        if "initial_a" in expected[path].params:
            continue  # a plain LoRA in the folder
        assert entry.params.keys() == expected[path].params.keys()
        for name, value in entry.params.items():
            np.testing.assert_allclose(value, expected[path].params[name], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(again(X), model(X), rtol=1e-5, atol=1e-5)


def exact(*paths: str) -> str:
    return "|".join(path.replace(".", r"\.").replace("+", r"\+") for path in paths)


def varied(paths) -> mj.LoRAConfig:
    """Another rank and another alpha for each path."""
    ranks = {f"^{exact(path)}": 1 + i % 5 for i, path in enumerate(paths)}
    alphas = {f"^{exact(path)}": 0.5 + i for i, path in enumerate(paths)}
    return mj.LoRAConfig(rank=3, alpha=2.0, rank_pattern=ranks, alpha_pattern=alphas)


@pytest.mark.parametrize(
    "config",
    [
        varied(PATHS),
        mj.LoRAConfig(rank=2, rank_pattern={"^out": 4}, alpha_pattern={"^out": 1.0}),
        mj.LoRAConfig(rank=4, targets="^out$"),
        mj.LoRAConfig(rank=2, targets=exact("block.out", "layers.1.proj", "w__", "1")),
        mj.LoRAConfig(rank=2, targets=exact("out", "default", "block.base_layer", "w_+"), bias="lora_only"),
        mj.RsLoRAConfig(rank=2, rank_pattern={r"block\.out": 3, r"^w_\+": 1}, use_dora=True),
        mj.PiSSAConfig(rank=2, rank_pattern={"^out": 3}),
        mj.MoRAConfig(rank=2, kind="sharing", rank_pattern={"^out": 4, r"layers\.1\.proj": 1}),
        mj.VeRAConfig(rank=8, targets="^(out|default)$"),
        mj.MiSSConfig(rank=3, targets="^(.*out|1)$", bias="lora_only"),
        mj.RandLoRAConfig(rank=3, targets="^(.*out|1)$", bases="sparse"),
        mj.AdaLoRAConfig(rank=3, target_rank=2, total_steps=9, tinit=1, tfinal=1, targets="^(out|default)$"),
        mj.BitFitConfig(targets="^(out|w__)$"),
        mj.IA3Config(targets="^(.*out|1)$", feedforward=("block.out",)),
    ],
    ids=lambda config: type(config).__name__,
)
def test_folders_hold_each_layer_for_itself(tmp_path, config):
    assert_returns(adapted(config), tmp_path / "adapter")


def test_one_name_for_all_where_it_says_enough(tmp_path):
    mj.save_adapter(adapted(mj.LoRAConfig(rank=2), PATHS[:-1]), tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted({path.rpartition(".")[2] for path in PATHS[:-1]})


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")  # PEFT draws RandLoRA's bases again
@pytest.mark.parametrize(
    "config",
    [
        varied(PEFTS),
        mj.LoRAConfig(rank=4, targets="^out$"),
        mj.LoRAConfig(rank=2, targets=exact("block.out", "layers.1.proj", "w__", "1")),
        mj.DoRAConfig(rank=2, targets=exact("out", "default", "w_+"), rank_pattern={"^out": 3}),
        mj.IA3Config(targets="^(.*out|1)$", feedforward=("block.out",)),
        mj.MiSSConfig(rank=3, targets="^(.*out|1)$"),
        mj.RandLoRAConfig(rank=3, targets="^(.*out|1)$"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_real_peft_tells_them_apart(tmp_path, config):
    model = adapted(config, PEFTS)
    mj.save_adapter(model, tmp_path)
    # PEFT writes its configurations with sorted keys, so their order can't be what tells layers apart.
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values, sort_keys=True))
    theirs = peft.PeftModel.from_pretrained(torch_tree(Tree(PEFTS)), tmp_path)
    wrapped = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "base_layer")}
    assert wrapped == {entry.path for entry in adapters_of(model)}
    with torch.no_grad():
        y = theirs.base_model.model(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(y, model(X), rtol=1e-5, atol=1e-5)
    assert_returns(model, tmp_path / "again")


def test_patterns_need_no_order():
    values = {"out": 4, "block.out": 8, "a.block.out": 2, "w_+": 4, "w__": 2, "layers.1": 4, "layersX1": 2}
    for default in (2, 4, 8):
        pattern = pattern_for(values, default)
        assert {path: value_at(sorted(pattern.items()), path, default) for path in values} == values
        assert {path: value_at(reversed(pattern.items()), path, default) for path in values} == values
    assert pattern_for({"model.layers.1.q_proj": 4, "model.layers.11.q_proj": 8}, 8) == {"model.layers.1.q_proj": 4}


def test_targets_name_no_path_too_many():
    paths = ["out", "block.out", "block.up", "x.up"]
    assert targets_for(["out", "block.out"], paths) == ["out"]
    assert targets_for(["block.out", "x.up"], paths) == ["block.out", "x.up"]
    assert targets_for(["out", "x.up"], paths) == r"^(out|x\.up)$"


def test_two_layers_of_one_path_are_refused():
    class Twice(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a = nnx.Dict({"b": nnx.Linear(4, 4, rngs=rngs)})
            self.all = nnx.Dict({"c.d": nnx.Linear(4, 4, rngs=rngs), "c": nnx.Dict({"d": nnx.Linear(4, 4, rngs=rngs)})})

    with pytest.raises(ValueError, match="two layers have the path all.c.d"):
        mj.attach(Twice(), mj.LoRAConfig(rank=2), rngs=nnx.Rngs(0))


def test_a_name_that_files_read_otherwise_is_refused(tmp_path):
    paths = ("up", "block.lora_B")
    model = adapted(mj.LoRAConfig(rank=2, targets="up", bias="all"), paths)
    with pytest.raises(InputError, match=r"block\.lora_B has a name that PEFT's files can't hold"):
        mj.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
