"""Adapters on models that other packages define: what attaches, trains, merges and is saved.

    python benchmarks/other_models.py [--models gemma dm-haiku …]

Each model is a tiny one of the package's own class with random weights. LoRA and MoRA go on it by the line that a user
would write: `mj.attach` for Flax NNX, `mora_jax.linen.adapted` for Linen, `mj.functional` for trees of arrays. Then its
adapters get random numbers and it is merged, saved and loaded, and from a fresh adapter it is trained for some steps to
other outputs. One process a model; packages that aren't installed are named as not tried.

`layers` are the matrices with an adapter, `of matrices %` what they hold of all numbers in matrices, `trained %` the
trained share of all parameters. The loss is the mean squared difference to outputs with noise, 1 for the base.
`merge error` and `load error` are the largest difference of outputs between the adapted model and the merged one, or
the one that read the folder, relative to the largest output.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from measuring import save, table

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--json {json}"
QUICK = "--models equinox dm-haiku --steps 5"
#: How long one model may take, in seconds.
LIMIT = 600
COLUMNS = [
    "package",
    "version",
    "class",
    "by",
    "method",
    "layers",
    "of matrices %",
    "trained %",
    "loss before",
    "after",
]


class Adapting(Protocol):
    """One model with the three ways of adapting it behind the same calls."""

    by: str
    report: Any

    def base(self) -> Any:
        """What has to stay as it is, as a tree."""

    def fresh(self) -> Any:
        """The adapters, as a tree."""

    def output(self, adapters: Any) -> Any:
        """With adapters, differentiable."""

    def merged(self, adapters: Any) -> Any:
        """The output of the plain model with merged adapters."""

    def reloaded(self, adapters: Any, folder: str) -> Any:
        """The output of a new model with the adapters from a folder."""


class OnNNX:
    """`mj.attach`: `make` gives the module, `run` its output."""

    by = "NNX"

    def __init__(self, config: Any, make: Callable[[], Any], run: Callable[[Any], Any]):
        from flax import nnx

        import mora_jax as mj

        self._make, self._run = make, run
        model = self._plain()
        self.plain = self._compiled(model)
        self.report = mj.attach(model, config, rngs=1)
        self._graphdef, self._adapters, self._frozen = nnx.split(model, mj.AdapterParam, ...)

    def _plain(self) -> Any:
        model = self._make()
        model.eval()
        return model

    def _model(self, adapters: Any) -> Any:
        from flax import nnx

        return nnx.merge(self._graphdef, adapters, self._frozen, copy=True)

    def base(self) -> Any:
        from flax import nnx

        return nnx.to_pure_dict(nnx.state(self._frozen, nnx.Param))

    def fresh(self) -> Any:
        return self._adapters

    def output(self, adapters: Any) -> Any:
        return self._run(self._model(adapters))

    def merged(self, adapters: Any) -> Any:
        import mora_jax as mj

        model = self._model(adapters)
        mj.merge(model)
        return self._compiled(model)

    def reloaded(self, adapters: Any, folder: str) -> Any:
        import mora_jax as mj

        mj.save_adapter(self._model(adapters), folder)
        model = self._plain()
        mj.load_adapter(model, folder)
        return self._compiled(model)

    def _compiled(self, model: Any) -> Any:
        import jax
        from flax import nnx

        graphdef, state = nnx.split(model)
        return jax.jit(lambda state: self._run(nnx.merge(graphdef, state, copy=True)))(state)


class OnLinen:
    """`mora_jax.linen.adapted`: `arguments` and `options` are those of a call of `module`."""

    by = "Linen"

    def __init__(
        self, config: Any, module: Any, *arguments: Any, picked: Callable[[Any], Any] = lambda y: y, **options
    ):
        import jax

        from mora_jax.linen import adapted

        self._config, self._picked = config, picked
        self._apply = jax.jit(lambda variables: picked(module.apply(variables, *arguments, **options)))
        with adapted(config) as report:
            init = jax.jit(lambda key: module.init(key, *arguments, **options))
            self._variables = dict(init(jax.random.key(0)))
        self.report, self._linen_report = report.table, report
        self.plain = self._apply({"params": self._variables["params"]})

    def base(self) -> Any:
        return self._variables["params"]

    def fresh(self) -> Any:
        return self._variables["adapters"]

    def output(self, adapters: Any) -> Any:
        from mora_jax.linen import adapted

        with adapted(self._config):
            return self._apply(self._variables | {"adapters": adapters})

    def merged(self, adapters: Any) -> Any:
        from mora_jax.linen import merge

        variables = self._variables | {"adapters": adapters}
        return self._apply({"params": merge(variables, self._config, report=self._linen_report)})

    def reloaded(self, adapters: Any, folder: str) -> Any:
        from mora_jax.linen import adapted, load_adapter, save_adapter

        save_adapter(self._variables | {"adapters": adapters}, folder, self._config, report=self._linen_report)
        config, variables = load_adapter({"params": self._variables["params"]}, folder)
        with adapted(config):
            return self._apply(variables)


class OnTree:
    """`mj.functional`: `function` takes the tree."""

    by = "tree"

    def __init__(self, config: Any, params: Any, function: Callable[[Any], Any]):
        import jax

        import mora_jax as mj

        self._config, self._params, self._function = config, params, function
        self.plain = jax.jit(lambda: function(params))()
        self._adapters = mj.functional.init(params, config, rngs=0)
        self.report = mj.functional.report(params, config)

    def base(self) -> Any:
        import jax

        return [leaf for leaf in jax.tree.leaves(self._params) if hasattr(leaf, "shape")]

    def fresh(self) -> Any:
        return self._adapters

    def output(self, adapters: Any) -> Any:
        import mora_jax as mj

        return mj.functional.apply(self._function, self._params, adapters, self._config)()

    def merged(self, adapters: Any) -> Any:
        import jax

        import mora_jax as mj

        merge = partial(mj.functional.merge, self._params, config=self._config)
        return jax.jit(lambda adapters: self._function(merge(adapters)))(adapters)

    def reloaded(self, adapters: Any, folder: str) -> Any:
        import jax

        import mora_jax as mj

        mj.functional.save(self._params, adapters, folder, self._config)
        config, adapters = mj.functional.load(self._params, folder)
        return jax.jit(mj.functional.apply(self._function, self._params, adapters, config))()


def _ids(vocabulary: int = 50, rows: int = 2, length: int = 8) -> Any:
    import jax.numpy as jnp
    import numpy as np

    return jnp.asarray(np.random.default_rng(0).integers(1, vocabulary, (rows, length)), jnp.int32)


def _image(size: int) -> Any:
    import jax

    return jax.random.normal(jax.random.key(5), (2, size, size, 3))


def _tunix(family: str, kind: str, **options: Any) -> Callable[[Any], Adapting]:
    """A language model of Tunix; its sizes have other names in other families."""

    def build(config: Any) -> Adapting:
        import jax.numpy as jnp
        from flax import nnx

        models = importlib.import_module(f"tunix.models.{family}.model")
        sizes = {"num_layers": 2, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
        settings = models.ModelConfig(**sizes | options)
        ids = _ids()
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((ids.shape[1],) * 2, bool)), (len(ids), *ids.shape[1:] * 2))
        make = getattr(models, kind)
        return OnNNX(
            config, lambda: make(settings, rngs=nnx.Rngs(0)), lambda model: model(ids, positions, None, mask)[0]
        )

    return build


_LLAMA = {"vocab_size": 50, "rope_theta": 10_000, "norm_eps": 1e-5}


def _gemma3(config: Any) -> Adapting:
    import jax.numpy as jnp
    from gemma import gm
    from gemma.gm.nn import _config

    kinds = (gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL)
    settings = _config.TransformerConfig(
        num_embed=50,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=kinds,
        sliding_window_size=4,
        use_qk_norm=True,
    )
    model = gm.nn.Transformer(config=settings, dtype=jnp.float32)
    return OnLinen(config, model, _ids(), picked=lambda output: output.logits)


def _flaxdiff(kind: str, **options: Any) -> Callable[[Any], Adapting]:
    def build(config: Any) -> Adapting:
        import jax
        import jax.numpy as jnp

        module = importlib.import_module(
            "flaxdiff.models.simple_unet" if kind == "Unet" else "flaxdiff.models.simple_dit"
        )
        text = jax.random.normal(jax.random.key(6), (2, 5, 12))
        return OnLinen(config, getattr(module, kind)(**options), _image(16), jnp.array([0.1, 0.7]), text)

    return build


def _kauldron(config: Any) -> Adapting:
    from kauldron import kd

    block = kd.nn.PreNormBlock.from_spec(num_heads=2, mlp_size=24)
    layers = tuple(block.copy(name=f"block_{i}") for i in range(2))
    encoder = kd.nn.VitEncoder(layers=layers, embedding=kd.nn.PatchifyEmbed(patch_size=(4, 4), hidden_size=16))
    return OnLinen(config, encoder, _image(16))


def _artifex(config: Any) -> Adapting:
    import jax.numpy as jnp
    from artifex.generative_models.core.configuration.backbone_config import UNetBackboneConfig
    from artifex.generative_models.models.backbones.unet import UNet
    from flax import nnx

    # Three channels a group: group norms of one take away what the embedding of time adds.
    sizes = {"hidden_dims": (12, 24), "in_channels": 3, "out_channels": 3, "time_embedding_dim": 16}
    settings = UNetBackboneConfig(name="unet", activation="gelu", **sizes)
    return OnNNX(
        replace(config, targets=".*"),  # convolutions, too
        lambda: UNet(config=settings, rngs=nnx.Rngs(0)),
        lambda model: model(_image(16), jnp.array([1, 5])),
    )


def _swin(config: Any) -> Adapting:
    from flax import nnx
    from heal_swin_nnx.models.swin import SwinParams, SwinUnet

    sizes = {"img_size": 16, "in_channels": 3, "out_channels": 2, "embed_dim": 12}
    params = SwinParams(**sizes, depths=(1, 1), num_heads=(3, 6), patch_size=(2, 2), dtype="float32")
    return OnNNX(config, lambda: SwinUnet(params, rngs=nnx.Rngs(0)), lambda model: model(_image(16)))


def _mamba(config: Any) -> Adapting:
    from flax import nnx
    from mamba2_jax.modeling import Mamba2Config, Mamba2ForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "state_size": 8, "head_dim": 8, "chunk_size": 8}
    settings = Mamba2Config(**sizes, num_hidden_layers=2)
    return OnNNX(config, lambda: Mamba2ForCausalLM(settings, rngs=nnx.Rngs(0)), lambda model: model(_ids())["logits"])


def _dantinox(config: Any) -> Adapting:
    from dantinox.core.config import ModelConfig
    from dantinox.core.model import Transformer
    from flax import nnx

    settings = ModelConfig(dim=16, n_heads=4, num_blocks=2, vocab_size=50, max_context=16)
    return OnNNX(config, lambda: Transformer(settings, rngs=nnx.Rngs(0)), lambda model: model(_ids()).logits)


def _equinox(config: Any) -> Adapting:
    import equinox as eqx
    import jax

    class Block(eqx.Module):
        """The package's own attention and multi-layer perceptron."""

        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __init__(self, key: Any):
            keys = jax.random.split(key)
            self.attention = eqx.nn.MultiheadAttention(4, 16, key=keys[0])
            self.mlp = eqx.nn.MLP(16, 16, 24, 1, key=keys[1])

        def __call__(self, x: Any) -> Any:
            x = x + self.attention(x, x, x)
            return x + jax.vmap(self.mlp)(x)

    x = jax.random.normal(jax.random.key(5), (8, 16))
    blocks = [Block(key) for key in jax.random.split(jax.random.key(0))]
    return OnTree(config, blocks, lambda blocks: blocks[1](blocks[0](x)))


def _equimo(config: Any) -> Adapting:
    import equinox as eqx
    import jax
    from equimo.vision.models.vit import VisionTransformer

    sizes = {"img_size": 16, "in_channels": 3, "patch_size": 4, "dim": 16, "depths": [2], "num_heads": [4]}
    model = eqx.nn.inference_mode(VisionTransformer(**sizes, num_classes=5, key=jax.random.key(0)))
    image = _image(16)[0].transpose(2, 0, 1)
    return OnTree(config, model, lambda model: model(image, key=jax.random.key(1)))


def _haiku(config: Any) -> Adapting:
    import haiku as hk
    import jax

    def forward(x: Any) -> Any:
        for _ in range(2):
            x = x + hk.MultiHeadAttention(2, 8, w_init=hk.initializers.VarianceScaling(1.0), model_size=16)(x, x, x)
            x = x + hk.nets.MLP([24, 16])(x)
        return x

    x = jax.random.normal(jax.random.key(5), (2, 8, 16))
    model = hk.without_apply_rng(hk.transform(forward))
    return OnTree(config, model.init(jax.random.key(0), x), lambda params: model.apply(params, x))


@dataclass(frozen=True)
class Model:
    """A class of a package.

    Attributes:
        package: its name in the package index.
        kind: the class.
        build: the model with adapters of a configuration.
    """

    package: str
    kind: str
    build: Callable[[Any], Adapting]


MODELS = {
    "tunix-llama": Model("google-tunix", "llama3 Llama3", _tunix("llama3", "Llama3", **_LLAMA)),
    "tunix-qwen": Model("google-tunix", "qwen3 Qwen3", _tunix("qwen3", "Qwen3", **_LLAMA)),
    "tunix-experts": Model(
        "google-tunix",
        "qwen3 Qwen3 with experts",
        _tunix("qwen3", "Qwen3", **_LLAMA, num_experts=4, num_experts_per_tok=2),
    ),
    "tunix-gemma3": Model(
        "google-tunix", "gemma3 Gemma3", _tunix("gemma3", "Gemma3", num_embed=50, sliding_window_size=4)
    ),
    "tunix-gemma4": Model(
        "google-tunix",
        "gemma4 Gemma4",
        _tunix("gemma4", "Gemma4", num_embed=50, sliding_window_size=4, per_layer_input_dim=4, global_key_size=8),
    ),
    "gemma": Model("gemma", "gm.nn.Transformer", _gemma3),
    "flaxdiff-unet": Model(
        "flaxdiff",
        "Unet",
        _flaxdiff(
            "Unet",
            emb_features=16,
            feature_depths=[8, 16],
            attention_configs=[{"heads": 2}, {"heads": 2}],
            num_res_blocks=1,
            norm_groups=4,
        ),
    ),
    "flaxdiff-dit": Model(
        "flaxdiff", "SimpleDiT", _flaxdiff("SimpleDiT", patch_size=4, emb_features=16, num_layers=2, num_heads=2)
    ),
    "kauldron": Model("kauldron", "kd.nn.VitEncoder", _kauldron),
    "artifex": Model("avitai-artifex", "UNet", _artifex),
    "heal-swin": Model("heal-swin-nnx", "SwinUnet", _swin),
    "mamba2": Model("mamba2-jax", "Mamba2ForCausalLM", _mamba),
    "dantinox": Model("dantinox", "Transformer", _dantinox),
    "equinox": Model("equinox", "nn.MultiheadAttention, nn.MLP", _equinox),
    "equimo": Model("equimo", "VisionTransformer", _equimo),
    "dm-haiku": Model("dm-haiku", "MultiHeadAttention, nets.MLP", _haiku),
}


def installed(package: str) -> str:
    """Its version; empty where it isn't there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def measured(name: str, steps: int) -> list[dict[str, Any]]:
    """What one model did, a dictionary a method."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import mora_jax as mj

    figures = []
    for config in (mj.LoRAConfig(rank=4, alpha=8.0), mj.MoRAConfig(rank=4)):
        model = MODELS[name].build(config)
        adapters, base = model.fresh(), [np.array(leaf) for leaf in jax.tree.leaves(model.base())]
        keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(adapters))))
        random = jax.tree.map(
            lambda leaf, keys=keys: 0.05 * jax.random.normal(next(keys), leaf.shape, leaf.dtype), adapters
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y, z = jax.jit(model.output)(random), model.merged(random)
            with tempfile.TemporaryDirectory() as folder:
                again = model.reloaded(random, folder)
        size = float(jnp.abs(y).max())
        noise = jax.random.normal(jax.random.key(4), model.plain.shape)
        goal = model.plain + 0.3 * (jnp.std(model.plain) or 1.0) * noise  # some models start at zero
        optimizer = optax.adam(1e-3)
        state, losses = optimizer.init(adapters), []

        @jax.jit
        def step(adapters: Any, state: Any, model: Any = model, goal: Any = goal, optimizer: Any = optimizer) -> Any:
            def loss(adapters: Any) -> Any:
                return jnp.mean((model.output(adapters) - goal) ** 2) / jnp.mean((model.plain - goal) ** 2)

            value, gradients = jax.value_and_grad(loss)(adapters)
            updates, state = optimizer.update(gradients, state, adapters)
            return optax.apply_updates(adapters, updates), state, value

        for _ in range(steps + 1):
            adapters, state, value = step(adapters, state)
            losses.append(float(value))
        report = model.report
        held = sum(match.layers * match.in_features * match.out_features for match in report.matches)
        figures.append(
            {
                "by": model.by,
                "method": report.method,
                "layers": sum(match.layers for match in report.matches),
                "left": [[list(one.paths), one.kind, one.parameters, one.reason] for one in report.skipped],
                "held": held / (held + sum(one.parameters for one in report.skipped)),
                "share": report.trainable / report.total,
                "before": losses[0],
                "after": losses[-1],
                "effect": float(jnp.abs(y - model.plain).max()) / size,
                "merge": float(jnp.abs(z - y).max()) / size,
                "load": float(jnp.abs(again - y).max()) / size,
                "same": all(map(np.array_equal, base, jax.tree.leaves(model.base()))),
            }
        )
    return figures


def main() -> None:
    """A row a model and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one, args.steps)))
        return
    rows, absent, failed, figures = [], [], [], {}
    for name in args.models:
        model = MODELS[name]
        version = installed(model.package)
        if not version:
            absent.append(model.package)
            continue
        command = [sys.executable, __file__, "--one", name, "--steps", str(args.steps)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
            said, error = done.stdout.strip().splitlines(), done.stderr.strip().splitlines()[-1:]
            figures[name] = json.loads(said[-1]) if done.returncode == 0 else []
        except subprocess.TimeoutExpired:
            figures[name], error = [], [f"longer than {LIMIT} s"]
        if not figures[name]:
            failed.append(f"{model.package} {version}, {model.kind}: {' '.join(error)}")
        for one in figures[name]:
            cells = [str(one["layers"]), f"{100 * one['held']:.0f}", f"{100 * one['share']:.1f}"]
            cells += [f"{one[key]:.3f}" for key in ("before", "after")]
            cells += [f"{one[key]:.1e}" for key in ("merge", "load")]
            rows.append([model.package, version, model.kind, one["by"], one["method"], *cells])
            if not one["same"] or one["effect"] < 1e-3:
                failed.append(f"{model.package}: the base changed, or the adapters changed nothing")
    print(table([*COLUMNS, "merge error", "load error"], 5, rows))
    reasons = {}
    for name, found in figures.items():
        for paths, kind, _, reason in found[0]["left"] if found else []:
            reasons.setdefault(reason, []).append(f"{name}: {', '.join(paths)}" + (f" ({kind})" if kind else ""))
    for reason, places in reasons.items():
        print(f"\nWithout an adapter, {reason}: {'; '.join(places)}.")
    for line in failed:
        print(f"\nFailed: {line}.")
    if absent:
        print(f"\nNot tried, since not installed: {', '.join(dict.fromkeys(absent))}.")
    save(args.json, figures)


if __name__ == "__main__":
    main()
