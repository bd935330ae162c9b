# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Adapters in your own Flax model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/mora-jax/blob/main/notebooks/own_model.ipynb)
#
# Your model stays a plain Flax model: no wrapper class, and no trainer needed. The same task three times, a
# classifier that was trained on one kind of data and is adapted to another, in NNX, in Linen, and as a bare tree of
# arrays (as in Equinox, Haiku, or code of your own). It runs in seconds on a CPU.

# %% [markdown]
# The first cell installs the package where it is missing, as on Colab, and leaves jax as it is.

# %%
# Installs mora-jax where it is missing, from a wheel or a clone beside this notebook or else from PACKAGE, and keeps
# the jax of the runtime: another one would not fit the plugin of its accelerator.
import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("mora_jax") is None:
    PACKAGE = "git+https://github.com/OWNER/mora-jax"  # or a name on an index
    wheel = next(pathlib.Path().absolute().glob("mora_jax-*.whl"), None)
    clone = pathlib.Path("..").absolute() if pathlib.Path("../pyproject.toml").exists() else None
    package = f"mora-jax[plots] @ {PACKAGE}" if "://" in PACKAGE else f"{PACKAGE}[plots]"
    package = f"{wheel or clone}[plots]" if wheel or clone else package
    there = [name for name in ("jax", "jaxlib") if importlib.util.find_spec(name)]
    keep = [f"{name}=={importlib.metadata.version(name)}" for name in there]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package, *keep], check=True)
    if "flax" in sys.modules:
        print("flax was imported before: restart the session (Runtime, Restart session) and run all cells again")

# %%
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn, nnx

import mora_jax as mj
from mora_jax.linen import adapted, merge
from mora_jax.training.freeze import train_adapters

# %% [markdown]
# ## Two tasks
#
# Points in 16 dimensions belong to one of four classes. In the second task the same points are turned, and there
# are few of them.

# %%
draw = np.random.default_rng(0)
centres = draw.normal(size=(4, 16))
turn, _ = np.linalg.qr(draw.normal(size=(16, 16)))


def task(count, turned):
    labels = draw.integers(4, size=count)
    points = (centres[labels] + 0.7 * draw.normal(size=(count, 16))) @ (turn if turned else np.eye(16))
    return jnp.asarray(points, jnp.float32), jnp.asarray(labels)


old, new, test = task(2000, False), task(200, True), task(1000, True)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits, labels):
    return float((logits.argmax(-1) == labels).mean())


history = {}

# %% [markdown]
# ## NNX
#
# First an ordinary model, trained on the first task as usual.


# %%
class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(16, 64, rngs=rngs)
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.gelu(self.hidden(nnx.gelu(self.embed(x)))))


model = Classifier(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, gradients = nnx.value_and_grad(lambda model: cross_entropy(model(x), y))(model)
    optimizer.update(model, gradients)
    return loss


for _ in range(100):
    train_step(model, optimizer, *old)
print(f"first task {accuracy(model(old[0]), old[1]):.2f}, second task {accuracy(model(test[0]), test[1]):.2f}")
kernels = {
    "params": {
        name: {"kernel": getattr(model, name).kernel[...], "bias": getattr(model, name).bias[...]}
        for name in ("embed", "hidden", "out")
    }
}  # the same weights for Linen and for the tree

# %% [markdown]
# Now adapters. `attach` finds the layers in any module and says what matched; the model's class and code are
# untouched, and its output is unchanged until something is trained.

# %%
x, y = new
before = model(x)
print(mj.attach(model, mj.MoRAConfig(rank=2), rngs=nnx.Rngs(1)))
print("same output:", bool(jnp.all(model(x) == before)))

# %% [markdown]
# `partition` splits the model into what is trained and what is not; `jax.grad` and optax see the first alone.

# %%
graphdef, adapters, frozen = mj.partition(model)
optimizer = optax.adamw(1e-2)
state = optimizer.init(adapters)


@jax.jit
def step(adapters, state, frozen):
    def loss(adapters):
        return cross_entropy(nnx.merge(graphdef, adapters, frozen)(x), y)

    value, gradients = jax.value_and_grad(loss)(adapters)
    updates, state = optimizer.update(gradients, state, adapters)
    return optax.apply_updates(adapters, updates), state, value


history["NNX, MoRA"] = []
for _ in range(60):
    adapters, state, value = step(adapters, state, frozen)
    history["NNX, MoRA"].append(float(value))
model = nnx.merge(graphdef, adapters, frozen)
print(f"second task {accuracy(model(test[0]), test[1]):.2f}")

# %% [markdown]
# Save the adapter, load it onto the base, and merge it: what is left are plain `nnx.Linear` layers.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
mj.save_adapter(model, folder / "nnx")
print(*sorted(path.name for path in (folder / "nnx").iterdir()), sep=", ")
trained = model(test[0])
mj.merge(model)
print(type(model.hidden).__name__, bool(jnp.allclose(model(test[0]), trained, atol=1e-4)))

# %% [markdown]
# ## Linen
#
# The same weights in a Linen model. While the context `adapted` is open, `init` makes the collection `adapters`
# beside `params`, and `apply` uses it. The model's code stays as it is.


# %%
class LinenClassifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(64, name="embed")(x))
        return nn.Dense(4, name="out")(nn.gelu(nn.Dense(64, name="hidden")(x)))


plain = LinenClassifier()
config = mj.LoRAConfig(rank=4, alpha=8.0)
optimizer = train_adapters(optax.adamw(1e-2))  # takes all variables, updates the adapters


@jax.jit
def linen_step(variables, state):
    value, gradients = jax.value_and_grad(lambda variables: cross_entropy(plain.apply(variables, x), y))(variables)
    updates, state = optimizer.update(gradients, state, variables)
    return optax.apply_updates(variables, updates), state, value


history["Linen, LoRA"] = []
with adapted(config) as report:
    variables = plain.init(jax.random.key(0), x) | kernels
    state = optimizer.init(variables)
    for _ in range(60):
        variables, state, value = linen_step(variables, state)
        history["Linen, LoRA"].append(float(value))
    trained = plain.apply(variables, test[0])
print(report)
print(f"second task {accuracy(trained, test[1]):.2f}")
merged = plain.apply({"params": merge(variables, config)}, test[0])
print("merged into plain params:", bool(jnp.allclose(merged, trained, atol=1e-4)))

# %% [markdown]
# ## Any tree of arrays
#
# No modules at all: a function of parameters. The adapters are a plain tree beside them, which `jax.grad` and optax
# take as it is.

# %%
params = kernels["params"]


def forward(params, x):
    for name in ("embed", "hidden", "out"):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = jax.nn.gelu(x) if name != "out" else x
    return x


print(mj.functional.report(params, config))
adapters = mj.functional.init(params, config, rngs=0)
optimizer = optax.adamw(1e-2)
state = optimizer.init(adapters)


@jax.jit
def tree_step(adapters, state):
    def loss(adapters):
        return cross_entropy(mj.functional.apply(forward, params, adapters, config)(x), y)

    value, gradients = jax.value_and_grad(loss)(adapters)
    updates, state = optimizer.update(gradients, state, adapters)
    return optax.apply_updates(adapters, updates), state, value


history["tree, LoRA"] = []
for _ in range(60):
    adapters, state, value = tree_step(adapters, state)
    history["tree, LoRA"].append(float(value))
merged = mj.functional.merge(params, adapters, config)
print(f"second task {accuracy(forward(merged, test[0]), test[1]):.2f}")

# %% [markdown]
# ## The three runs

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
LOOKS = {"NNX, MoRA": ("#009E73", "-"), "Linen, LoRA": ("#0072B2", "--"), "tree, LoRA": ("#D55E00", ":")}
for name, losses in history.items():
    axes.plot(losses, color=LOOKS[name][0], linestyle=LOOKS[name][1], linewidth=2, label=name)
axes.set(xlabel="step", ylabel="loss on the second task", yscale="log")
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The page *Adapters in your own model* of the documentation goes on: dropout and batch statistics, stacked and
# scanned layers, Linen's own layers, `TrainState`, folders, and what each method has a form for.
