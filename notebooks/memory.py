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
# # Memory: LoRA against MoRA at equal parameters
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/mora-jax/blob/main/notebooks/memory.ipynb)
#
# MoRA's paper (arXiv 2405.12130) says that an update of low rank is a poor memory, and that MoRA learns random
# pairs by heart sooner than LoRA with as many trained parameters. This notebook tries it: random keys, random
# values, and nothing that could be guessed. Each method first gets a learning rate of its own.
#
# It runs on the embedded model of 785 thousand parameters, in a few minutes on two CPU cores. `mora-jax study
# memorize` asks the same with more arms, more seeds and intervals, and on larger models.

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
import random
import tempfile

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

import mora_jax as mj
from mora_jax import demo
from mora_jax.data import load_tokenizer
from mora_jax.evaluation import generate_batch

# %% [markdown]
# ## Random pairs
#
# A key and a value are six letters each out of sixteen, four bits a letter. A guess is right once in sixteen times.

# %%
PAIRS, LENGTH, STEPS, BATCH_SIZE, SEEDS = 64, 6, 160, 32, [1, 2, 3]
LETTERS = "abcdefghijklmnop"


def make_pairs(seed):
    draw = random.Random(seed)

    def letters():
        return " ".join(draw.choices(LETTERS, k=LENGTH))

    return [{"prompt": letters(), "completion": letters()} for _ in range(PAIRS)]


pairs = {seed: make_pairs(seed) for seed in [0, *SEEDS]}
for pair in pairs[1][:3]:
    print(pair["prompt"], "→", pair["completion"])

# %% [markdown]
# ## Three arms, and how much each trains
#
# LoRA and MoRA of rank 2 train about as many numbers; LoRA of rank 8 trains four times as many.

# %%
ARMS = {  # each with the learning rates to try
    "LoRA r2": (mj.LoRAConfig(rank=2, alpha=4.0), [3e-3, 6e-3, 1.2e-2, 2.4e-2]),
    "LoRA r8": (mj.LoRAConfig(rank=8, alpha=16.0), [3e-3, 6e-3, 1.2e-2, 2.4e-2]),
    "MoRA r2": (mj.MoRAConfig(rank=2, kind="rotation"), [5e-3, 1e-2, 2e-2, 4e-2]),
}
MODEL = demo.model_path()
tokenizer = load_tokenizer(MODEL)
COMMON = {
    "model.dtype": "float32",
    "data.max_length": 2 * LENGTH + 8,
    "optimizer.warmup_steps": 20,
    "log.compilation_cache": tempfile.mkdtemp(),  # a second sweep runs what the first one compiles
}


def sweep(arm, seed, grid, **others):
    """Runs of one arm on the pairs of a seed; the pairs themselves are what is scored."""
    return mj.sweep(
        MODEL,
        pairs[seed],
        ARMS[arm][0],
        grid=grid,
        eval_rows=pairs[seed],
        steps=STEPS,
        batch_size=BATCH_SIZE,
        config=COMMON | others,
    ).runs


# %% [markdown]
# ## Choose the learning rates
#
# On pairs of their own (seed 0), by the loss after the last step.

# %%
best, trained = {}, {}
for arm, (_, rates) in ARMS.items():
    runs = sweep(arm, 0, {"optimizer.learning_rate": rates}, **{"train.eval_on_start": False})
    losses = {run.values["optimizer.learning_rate"]: run.score for run in runs}
    best[arm], trained[arm] = min(losses, key=losses.get), runs[0].summary["trainable_parameters"]
    edge = ", at the edge of what was tried" if best[arm] in (min(rates), max(rates)) else ""
    words = ", ".join(f"{rate:g}: {loss:.2f}" for rate, loss in losses.items())
    print(f"{arm}: {trained[arm]:,} parameters, best rate {best[arm]:g}{edge} (nats a token: {words})")

# %% [markdown]
# ## Learn by heart, with three seeds
#
# Each seed has other pairs, another order and another start. The loss is scored along the way; at the end every
# value is written from memory, letter by letter.

# %%
curves, right = {}, {}
for arm in ARMS:
    curves[arm], right[arm] = [], []
    for seed in SEEDS:
        grid = [{"optimizer.learning_rate": best[arm], "seed": seed}]
        (run,) = sweep(arm, seed, grid, **{"train.eval_every": STEPS // 8})
        curves[arm].append([(row["step"], row["eval_loss"]) for row in run.metrics if "eval_loss" in row])
        keys = [pair["prompt"] for pair in pairs[seed]]
        written = generate_batch(run.model, tokenizer, keys, max_new_tokens=LENGTH + 1, batch_size=PAIRS)
        letters = [
            one == other
            for pair, answer in zip(pairs[seed], written, strict=True)
            for one, other in zip(pair["completion"].split(), answer.split() + [""] * LENGTH, strict=False)
        ]
        right[arm].append(np.mean(letters))

# %%
LOOKS = {
    "LoRA r2": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "LoRA r8": {"color": "#0072B2", "linestyle": "--", "marker": "D", "markerfacecolor": "white"},
    "MoRA r2": {"color": "#009E73", "linestyle": "-", "marker": "^"},
}
figure, (left, middle) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for arm in ARMS:
    steps, losses = np.array([step for step, _ in curves[arm][0]]), np.array(curves[arm])[..., 1]
    left.plot(steps, losses.mean(axis=0), label=arm, **LOOKS[arm])
    left.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=LOOKS[arm]["color"], alpha=0.15)
    marks = LOOKS[arm] | {"linestyle": "none", "markersize": 9}
    middle.plot([trained[arm]] * len(SEEDS), right[arm], **marks)
left.set(xlabel="step", ylabel="loss, nats a token", title="while learning", ylim=(0, None))
middle.axhline(1 / 16, color="grey", linewidth=1, linestyle=":")
middle.set(xlabel="trained parameters", ylabel="letters right", title="written from memory", ylim=(0, 1.05))
middle.set_xscale("log")
middle.set_xticks([20_000, 40_000, 80_000], ["20,000", "40,000", "80,000"])
middle.minorticks_off()
middle.set_xlim(13_000, 100_000)
for axes in (left, middle):
    axes.grid(alpha=0.3)
left.legend(frameon=False)
plt.show()

# %% [markdown]
# On the left the lines are means, and the bands reach from the lowest to the highest seed. On the right every mark
# is a seed; the dotted line is guessing.
#
# ## What the numbers say


# %%
def compare(one, other):
    differences = np.array(right[one]) - np.array(right[other])
    mean, reach = differences.mean(), stats.t.ppf(0.975, len(SEEDS) - 1) * stats.sem(differences)
    verdict = "these do not differ by more than the seeds do" if abs(mean) <= reach else "the interval leaves out zero"
    print(f"{one} less {other}: {mean:+.2f} [{mean - reach:+.2f}, {mean + reach:+.2f}], {verdict}")


for arm in ARMS:
    print(f"{arm}: {trained[arm]:,} trained parameters, {np.mean(right[arm]):.2f} of the letters right")
compare("MoRA r2", "LoRA r2")
compare("MoRA r2", "LoRA r8")

# %% [markdown]
# What this can and cannot say:
#
# - It says who learns *sooner*. A method that still rises may store as much in the end: raise `STEPS` and look.
# - Random letters are an extreme case. Most fine-tuning changes how a model answers rather than what it knows, and
#   there the two lie close together: see `learning_and_forgetting.ipynb`.
# - The model is tiny. On SmolLM2-135M `mora-jax study memorize` found means that lie alike, but three seeds did not
#   decide it. No independent replication of the paper at full size is known.
