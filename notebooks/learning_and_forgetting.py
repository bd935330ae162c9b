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
# # LoRA, MoRA and full: learning and forgetting
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/mora-jax/blob/main/notebooks/learning_and_forgetting.ipynb)
#
# Fine-tuning teaches a model something new, and it forgets some of what it knew. "LoRA Learns Less and Forgets
# Less" is the title of a well-known paper. Does it hold here, and where does MoRA lie? The answer depends on the
# learning rate, so each method first gets its own, chosen on one part of the data and judged on another.
#
# Everything is small: the embedded base model has less than a million parameters, and the whole notebook takes a
# few minutes on two CPU cores. What comes out says something about this model and these data, not about large
# ones.

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
import json
import tempfile

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

import mora_jax as mj
from mora_jax import demo
from mora_jax.data import load_rows, split_rows
from mora_jax.evaluation import LoglikelihoodScorer, generate_batch

# %% [markdown]
# ## The switch
#
# With `None` the notebook uses what is embedded in the package. For a real model give a folder or a hub id, for
# real data a file or a hub id in any format that the library reads, and a file of texts that the model should not
# forget. Then also raise `MAX_LENGTH`, and try lower learning rates: good ones for a large model are often ten
# times smaller.

# %%
MODEL = None  # or a folder, or a hub id such as "HuggingFaceTB/SmolLM2-135M"
DATA = None  # or a file, or a hub id
OLD_TEXTS = None  # or a file of JSON lines, each with a "text"

STEPS, BATCH_SIZE, MAX_LENGTH = 60, 8, 32
TEXTS = 60  # old texts that are scored
SEEDS = [0, 1, 2]
METHODS = {  # each with the learning rates to try
    "LoRA": ({"method": "lora", "rank": 8}, [2e-3, 6e-3, 2e-2]),
    "MoRA": ({"method": "mora", "kind": "rotation", "rank": 8}, [3e-3, 1e-2, 3e-2]),
    "full": ({"method": "full"}, [3e-4, 1e-3, 3e-3]),
}

# %% [markdown]
# ## Three parts of the data
#
# One part is trained on, one chooses the learning rates, and one is looked at only in the end.


# %%
def read(data):
    conversations = load_rows(data)
    return [{"messages": [{"role": m.role, "content": m.content} for m in row.messages]} for row in conversations]


if DATA is None:
    train, validation, test = (read(demo.data_path(part)) for part in ("train", "held_out", "test"))
else:
    rows = read(DATA)
    rest, held_out = split_rows(len(rows), 0.2)
    train, validation, test = ([rows[i] for i in part] for part in (rest, held_out[::2], held_out[1::2]))

model_path, old_texts = MODEL or demo.model_path(), OLD_TEXTS or demo.TEXTS
print(f"{len(train)} rows to train on, {len(validation)} to choose the rates, {len(test)} for the results")
for row in train[:3]:
    print(*(message["content"] for message in row["messages"]), sep=" → ")

# %% [markdown]
# ## Choose the learning rates
#
# One sweep trains every method with every rate and scores the answers of the validation part. Runs of the same
# shape train together. `train.eval_tasks` scores the old texts beside them: text like that which the base model
# was made from, and wasn't.


# %%
def settings(method, **others):
    return {f"adapter.{key}": value for key, value in METHODS[method][0].items()} | others


common = {
    "model.dtype": "float32",
    "data.max_length": MAX_LENGTH,
    "optimizer.warmup_steps": 5,
    "train.eval_tasks": [f"text={old_texts}"],
    "train.eval_tasks_limit": TEXTS,
    "log.compilation_cache": tempfile.mkdtemp(),  # the next sweep runs what this one compiles
}
choice = mj.sweep(
    model_path,
    train,
    grid=[settings(name, **{"optimizer.learning_rate": rate}) for name in METHODS for rate in METHODS[name][1]],
    eval_rows=validation,
    steps=STEPS,
    batch_size=BATCH_SIZE,
    config=common,
)

# %%
STYLES = {  # told apart by colour, dash and marker
    "LoRA": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "MoRA": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "full": {"color": "#009E73", "linestyle": ":", "marker": "^"},
}
names = [name for name, (_, rates) in METHODS.items() for _ in rates]
tried, cost = ({name: {} for name in METHODS} for _ in range(2))
for name, run in zip(names, choice.runs, strict=True):
    rate = run.values["optimizer.learning_rate"]
    tried[name][rate] = run.score
    cost[name][rate] = np.log(run.summary["eval_text_token_perplexity"])
best = {name: min(losses, key=losses.get) for name, losses in tried.items()}

figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for axes, losses, title in zip(panels, (tried, cost), ("validation answers", "old texts"), strict=True):
    for name in METHODS:
        axes.plot(losses[name].keys(), losses[name].values(), label=name, **STYLES[name])
        chosen = best[name], losses[name][best[name]]
        axes.plot(*chosen, "*", color="white", markeredgecolor="black", markersize=15, zorder=5)
    axes.set(title=title, xscale="log", xlabel="learning rate", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
panels[0].legend(frameon=False)
plt.show()

for name, losses in tried.items():
    edge = best[name] in (min(losses), max(losses))
    print(f"{name}: {best[name]:g}" + (", at the edge of what was tried: try further" if edge else ""))
for what, found in (("answers", tried), ("old texts", cost)):
    within = max(np.ptp(list(losses.values())) for losses in found.values())
    between = np.ptp([losses[best[name]] for name, losses in found.items()])
    print(
        f"{what}: a method's rates differ by up to {within:.2f} nats a token, methods at their rates by {between:.2f}"
    )

# %% [markdown]
# A star marks each method's best rate, chosen by the left side alone. A comparison at one rate for all would mostly
# compare rates, and what is forgotten (on the right) depends on the rate too. This is one seed, so rates that lie
# close together on the left could change places, and take what is forgotten with them.

# %% [markdown]
# ## Train with three seeds, and watch what is learned and forgotten
#
# Now `eval_rows` scores the answers of the test part in the course of a run, and the old texts are scored beside
# them. Nothing is chosen by either.

# %%
final = mj.sweep(
    model_path,
    train,
    grid=[
        settings(name, **{"optimizer.learning_rate": best[name], "seed": seed}) for name in METHODS for seed in SEEDS
    ],
    eval_rows=test,
    steps=STEPS,
    batch_size=BATCH_SIZE,
    config=common | {"train.eval_every": STEPS // 3, "train.eval_on_start": False},
)

# %%
runs = {name: final.runs[i * len(SEEDS) : (i + 1) * len(SEEDS)] for i, name in enumerate(METHODS)}
watched = [row["step"] for row in final.runs[0].metrics if "eval_loss" in row]
learned, forgotten = {}, {}  # arrays [seed, evaluation], in nats a token
for name in METHODS:
    rows = [[row for row in run.metrics if "eval_loss" in row] for run in runs[name]]
    learned[name] = np.array([[row["eval_loss"] for row in run] for run in rows])
    forgotten[name] = np.log([[row["eval_text_token_perplexity"] for row in run] for run in rows])

scorer = LoglikelihoodScorer(*mj.load_pretrained(model_path, dtype="float32"), batch_size=32)
with open(old_texts, encoding="utf-8") as lines:
    before = scorer.loglikelihood_rolling([json.loads(line)["text"] for line in list(lines)[:TEXTS]])
before = -sum(text.logprob for text in before) / sum(text.tokens for text in before)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for name in METHODS:
    for axes, losses in ((left, learned[name]), (right, forgotten[name])):
        axes.plot(watched, losses.mean(axis=0), label=name, **STYLES[name])
        axes.fill_between(watched, losses.min(axis=0), losses.max(axis=0), color=STYLES[name]["color"], alpha=0.15)
left.set(title="learning", xlabel="step", ylabel="test answers, nats a token", ylim=(0, None))
right.set(title="forgetting", xlabel="step", ylabel="old texts, nats a token")
right.axhline(before, color="black", linewidth=1)
right.text(0.99, before, "the base model ", transform=right.get_yaxis_transform(), ha="right", va="bottom")
left.legend(frameon=False)
for axes in (left, right):
    axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# Lines are means over the seeds, and bands reach from the lowest to the highest seed. Lower is better on both
# sides.
#
# ## Learning against forgetting
#
# The same runs without the steps: a path is the mean of the seeds from the first evaluation, on the right, to the
# last; the large marks are where the single seeds end. Down and to the left is better.

# %%
figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
for name in METHODS:
    axes.plot(learned[name].mean(axis=0), forgotten[name].mean(axis=0), label=name, markersize=5, **STYLES[name])
    marks = STYLES[name] | {"linestyle": "none"}
    axes.plot(learned[name][:, -1], forgotten[name][:, -1], markersize=10, alpha=0.5, **marks)
axes.axhline(before, color="black", linewidth=1)
axes.text(0.99, before, "the base model ", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
axes.set(xlabel="test answers, nats a token", ylabel="old texts, nats a token")
axes.legend(frameon=False)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What the numbers say
#
# Two questions, each for two pairs of methods: who has learned and forgotten more after equally many *steps*, and
# who has forgotten more at equal *learning*, that is, when each has the same loss on the answers? A difference is
# taken seed by seed, and its 95 % interval is Student's for so many seeds. Where the interval holds zero, the
# seeds differ as much as the methods do.


# %%
def compare(what, one, other, differences):
    mean = np.mean(differences)
    reach = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    words = f"{one} {'more' if mean > 0 else 'less'} than {other}"
    verdict = "no clear difference" if abs(mean) <= reach else words
    print(f"  {what}: {mean:+.2f} nats a token [{mean - reach:+.2f}, {mean + reach:+.2f}], {verdict}")


def forgotten_at(name, level):
    """What each seed had forgotten when its loss on the answers first came down to `level`."""
    lowest = np.minimum.accumulate(learned[name], axis=1)
    return np.array([np.interp(-level, -x, y) for x, y in zip(lowest, forgotten[name], strict=True)]) - before


print("method  trained parameters  learning rate  test answers  old texts (nats a token, mean of seeds)")
for name in METHODS:
    trained = runs[name][0].summary["trainable_parameters"]
    ends = [losses[name][:, -1].mean() for losses in (learned, forgotten)]
    print(f"{name:6}  {trained:>18,}  {best[name]:>13g}  {ends[0]:>12.2f}  {ends[1]:>9.2f}")
print(f"base model's old texts: {before:.2f}\n")

level = max(losses[:, -1].max() for losses in learned.values())
for one, other in (("LoRA", "full"), ("MoRA", "LoRA")):
    print(f"{one} and {other}")
    compare("learned, equal steps", one, other, learned[other][:, -1] - learned[one][:, -1])
    compare("forgot, equal steps", one, other, forgotten[one][:, -1] - forgotten[other][:, -1])
    compare("forgot, equal learning", one, other, forgotten_at(one, level) - forgotten_at(other, level))

# %% [markdown]
# Read it with care. Three seeds give wide intervals, and of so many intervals at 95 % one may well miss by
# chance. The rates were chosen for learning alone; another rule would give another forgetting.
# And the base model is tiny: on it an adapter of rank 8 has a tenth of the model's parameters, on a model of
# billions far below a hundredth.
#
# ## The same questions to all
#
# Questions of the test part, answered by the first seed of each method.

# %%
asked = test[:: max(1, len(test) // 6)][:6]
questions = [row["messages"][0]["content"] for row in asked]
answers = {
    name: generate_batch(runs[name][0].model, scorer.tokenizer, questions, max_new_tokens=16) for name in METHODS
}
for number, row in enumerate(asked):
    print(f"{questions[number]}\n  right: {row['messages'][1]['content']}")
    for name in METHODS:
        print(f"  {name}: {answers[name][number].strip()}")
