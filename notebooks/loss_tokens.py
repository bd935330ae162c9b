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
# # Which tokens should carry loss?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/mora-jax/blob/main/notebooks/loss_tokens.ipynb)
#
# An instruction and its answer are one text. Many libraries train the answer's tokens alone: the instruction is
# *masked*. Some train the instruction too, and one paper, "Instruction Tuning With Loss Over Instructions", finds
# this better when instructions are long, answers short and examples few. This notebook shows the modes in
# colours, and then tries masked against unmasked loss with short and with long instructions.
#
# It runs in a few minutes on two CPU cores, on the small model that is embedded in the package.

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
import html
import json
import tempfile

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML
from scipy import stats

import mora_jax as mj
from mora_jax import demo
from mora_jax.data import EncodedDataset, describe_example, inspect_dataset, load_rows, split_rows
from mora_jax.evaluation import LoglikelihoodScorer

# %% [markdown]
# ## The switch
#
# With `None` the notebook uses what is embedded in the package. For a real model give a folder or a hub id, for
# real data a file or a hub id in any format that the library reads, and JSON lines with a `text` for passages.
# Then also raise the two `MAX_LENGTH`, and try lower learning rates: good ones for a large model are often ten
# times smaller.

# %%
MODEL = None  # or a folder, or a hub id such as "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = None  # or a file, or a hub id
TEXTS = None  # or a file of JSON lines, each with a "text"

ROWS, STEPS, BATCH_SIZE = 64, 48, 8
MAX_LENGTH = {"short": 32, "long": 64}  # tokens
RATES = [2e-3, 6e-3, 2e-2]
SEEDS = [0, 1, 2]

# %% [markdown]
# ## The modes in colours
#
# A conversation of two turns. What counts fully is bold with a line below, what counts less is italic with a
# dashed line, and grey carries no loss. `<|user|>` and the like are this model's template. Point at a token for
# its weight. The first token has none in any mode, since nothing stands before it that could predict it.

# %%
conversation = {
    "messages": [
        {"role": "user", "content": "Tom has a red cap. The cap of Tom is?"},
        {"role": "assistant", "content": "red."},
        {"role": "user", "content": "The opposite of open?"},
        {"role": "assistant", "content": "closed."},
    ]
}
model_path = MODEL or demo.model_path()
model, tokenizer = mj.load_pretrained(model_path, dtype="float32")


STYLES = {
    "b": "color:#0b4a36; background:#d3f0e3; border-bottom:2px solid #0b6e4f",
    "i": "color:#5a3a00; background:#fbecc8; border-bottom:2px dashed #8a5a00",
    "span": "color:#767676",
}


def coloured(row, **mode):
    example = EncodedDataset.build(load_rows([row]), tokenizer, **mode)[0]
    tokens = []
    for text, weight, segment in describe_example(example, tokenizer):
        tag = "b" if weight == 1 else "i" if weight > 0 else "span"
        title = f"weight {weight:g}, {segment.replace('_', ' ')}"
        shown = html.escape(text).replace("\n", "↵\n")
        tokens.append(f'<{tag} style="{STYLES[tag]}" title="{title}">{shown}</{tag}>')
    return "".join(tokens)


MODES = {
    "masked": {"mode": "masked"},
    "last_turn": {"mode": "last_turn"},
    "weighted, 0.1": {"mode": "weighted", "prompt_weight": 0.1},
    "unmasked": {"mode": "unmasked"},
    "full": {"mode": "full"},
}
LEFT = "style='text-align:left; white-space:pre-wrap'"
cells = [f"<td {LEFT}>{name}</td><td {LEFT}>{coloured(conversation, **MODES[name])}</td>" for name in MODES]
HTML("<table>" + "".join(f"<tr>{cell}</tr>" for cell in cells) + "</table>")


# %% [markdown]
# ## Short and long instructions
#
# The same questions twice: as they are, and each behind a passage of four sentences that has nothing to do with
# it. So the answers are the same, and only the ratio of instruction to answer differs. Few rows are trained on,
# many times. Passages of the three parts differ too, and a fourth part of the texts is kept to see what is
# forgotten.


# %%
def read(data):
    conversations = load_rows(data)
    return [{"messages": [{"role": m.role, "content": m.content} for m in row.messages]} for row in conversations]


def behind(passages, rows):
    """The rows with a passage before the first question of each."""
    found = []
    for number, row in enumerate(rows):
        first, *others = row["messages"]
        text = f"{passages[number % len(passages)]} {first['content']}"
        found.append({"messages": [{**first, "content": text}, *others]})
    return found


if DATA is None:
    parts = [read(demo.data_path(part)) for part in ("train", "held_out", "test")]
else:
    rows = read(DATA)
    rest, held_out = split_rows(len(rows), 0.2)
    parts = [[rows[i] for i in part] for part in (rest, held_out[::2], held_out[1::2])]
parts[0] = parts[0][:ROWS]

with open(TEXTS or demo.TEXTS, encoding="utf-8") as lines:
    texts = [json.loads(line)["text"] for line in lines]
passages = [". ".join(text.split(". ")[:4]).removesuffix(".") + "." for text in texts]
data = {
    "short": parts,
    "long": [behind(passages[place::4], rows) for place, rows in enumerate(parts)],
}
old_texts = pathlib.Path(tempfile.mkdtemp()) / "old_texts.jsonl"
old_texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[3::4]), encoding="utf-8")

for name, (train, _, _) in data.items():
    print(f"{name}: {train[0]['messages'][0]['content']!r} → {train[0]['messages'][1]['content']!r}")

# %% [markdown]
# ## What share of the loss falls on answers
#
# The loss of a step is divided by the sum of the weights, so what instructions get is taken from the answers.
# `inspect_dataset` (on the command line `mora-jax inspect`) counts tokens and weights. The ratio in brackets is that
# of instruction tokens to answer tokens.

# %%
PARTS = {"assistant": "answer", "end_of_turn": "answer", "user": "instruction", "system": "instruction"}
ratio, advice, shares = {}, {}, {}
for name, (train, _, _) in data.items():
    for mode in MODES:
        facts = inspect_dataset(EncodedDataset.build(load_rows(train), tokenizer, **MODES[mode]))
        weights = dict.fromkeys(("answer", "instruction", "template"), 0.0)
        for segment, found in facts["segments"].items():
            weights[PARTS.get(segment, "template")] += found["tokens"] * found["mean_weight"]
        shares[name, mode] = {part: weight / sum(weights.values()) for part, weight in weights.items()}
    ratio[name], advice[name] = facts["ratio"], facts["advice"]

figure, panels = plt.subplots(1, 2, figsize=(10, 2.8), sharey=True, layout="constrained")
LOOKS = {"answer": ("#0072B2", ""), "instruction": ("#E69F00", "//"), "template": ("white", "..")}
for axes, name in zip(panels, data, strict=True):
    left = np.zeros(len(MODES))
    for part, (colour, hatch) in LOOKS.items():
        widths = [100 * shares[name, mode][part] for mode in MODES]
        axes.barh(list(MODES), widths, left=left, color=colour, hatch=hatch, edgecolor="black", label=part)
        left += widths
    axes.set(title=f"{name} instructions ({ratio[name]:.1f} to 1)", xlabel="share of the weight, %")
panels[0].invert_yaxis()
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
plt.show()

for name in data:
    print(f"{name}: {ratio[name]:.1f} instruction tokens for each answer token. Advice: {advice[name]}\n")

# %% [markdown]
# The advice quotes published studies and is of low confidence where they disagree: try it, on data that nothing
# else was chosen on.
#
# ## Masked against unmasked
#
# A LoRA adapter of rank 8 is trained by both modes on both kinds of instructions. First each of the four gets its
# learning rate, by the answers of the validation part. Whatever the mode, answers alone are scored.

# %%
ARMS = ("masked", "unmasked")
config = mj.LoRAConfig(rank=8, alpha=16.0)
common = {
    "model.dtype": "float32",
    "optimizer.warmup_steps": 5,
    "log.compilation_cache": tempfile.mkdtemp(),  # the next sweep runs what this one compiles
}


def sweep(name, grid, part, **others):
    return mj.sweep(
        model_path,
        data[name][0],
        config,
        grid=grid,
        eval_rows=data[name][part],
        steps=STEPS,
        batch_size=BATCH_SIZE,
        config=common | {"data.max_length": MAX_LENGTH[name]} | others,
    )


best = {}
for name in data:
    tried = sweep(name, {"loss.mode": ARMS, "optimizer.learning_rate": RATES}, part=1)
    for mode in ARMS:
        losses = {
            run.values["optimizer.learning_rate"]: run.score for run in tried.runs if run.values["loss.mode"] == mode
        }
        best[name, mode] = min(losses, key=losses.get)
        words = ", ".join(f"{rate:g}: {loss:.2f}" for rate, loss in losses.items())
        edge = ", at the edge" if best[name, mode] in (min(RATES), max(RATES)) else ""
        print(f"{name}, {mode}: best rate {best[name, mode]:g}{edge} (validation answers, nats a token: {words})")

# %% [markdown]
# Then three seeds of each with its rate, scored on the answers of the test part, and on the old texts that no
# passage was taken from.

# %%
answers, old = {}, {}  # a loss a seed, in nats a token
for name in data:
    grid = [
        {"loss.mode": mode, "optimizer.learning_rate": best[name, mode], "seed": seed}
        for mode in ARMS
        for seed in SEEDS
    ]
    final = sweep(name, grid, part=2, **{"train.eval_tasks": [f"text={old_texts}"]})
    for mode in ARMS:
        ends = [run.summary for run in final.runs if run.values["loss.mode"] == mode]
        answers[name, mode] = np.array([end["eval_loss"] for end in ends])
        old[name, mode] = np.log([end["eval_text_token_perplexity"] for end in ends])

scores = LoglikelihoodScorer(model, tokenizer, batch_size=32).loglikelihood_rolling(texts[3::4])
before = -sum(text.logprob for text in scores) / sum(text.tokens for text in scores)

# %%
LINES = {
    "masked": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "unmasked": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
}
figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for axes, losses, title in zip(panels, (answers, old), ("answers of the test part", "old texts"), strict=True):
    for mode in ARMS:
        axes.plot(ratio.values(), [losses[name, mode].mean() for name in data], label=mode, **LINES[mode])
        for name in data:
            seeds = losses[name, mode]
            axes.plot(
                [ratio[name]] * len(seeds), seeds, markersize=10, alpha=0.35, **LINES[mode] | {"linestyle": "none"}
            )
    axes.set(title=title, xscale="log", xlabel="instruction tokens an answer token", ylabel="loss, nats a token")
    axes.set_xticks(list(ratio.values()), [f"{value:.1f} ({name})" for name, value in ratio.items()])
    axes.minorticks_off()
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)
panels[1].axhline(before, color="black", linewidth=1)
panels[1].text(0.99, before, "the base model ", transform=panels[1].get_yaxis_transform(), ha="right", va="bottom")
panels[0].legend(frameon=False)
plt.show()


# %% [markdown]
# Lines join the means, large pale marks are the seeds, lower is better. Lines that cross mean that the better mode
# depends on the ratio, provided that the modes lie further apart than the seeds of each.
#
# ## What the numbers say
#
# Unmasked minus masked, seed by seed, with Student's 95 % interval. Where the interval holds zero, the seeds
# differ as much as the modes do.


# %%
def compare(differences):
    mean, reach = np.mean(differences), stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    verdict = "no clear difference" if abs(mean) <= reach else f"{'unmasked' if mean < 0 else 'masked'} is better"
    return verdict, f"{mean:+.2f} nats a token [{mean - reach:+.2f}, {mean + reach:+.2f}], {verdict}"


for what, losses in (("answers", answers), ("old texts", old)):
    verdicts = set()
    for name in data:
        verdict, words = compare(losses[name, "unmasked"] - losses[name, "masked"])
        verdicts.add(verdict)
        print(f"{what}, {name} instructions: {words}")
    if {"masked is better", "unmasked is better"} <= verdicts:
        print(f"{what}: the lines cross\n")
    elif len(verdicts) == 1 and "no clear difference" not in verdicts:
        print(f"{what}: no crossing, {verdicts.pop()} at both ratios\n")
    else:
        print(f"{what}: no crossing that the seeds confirm\n")

# %% [markdown]
# What this can and cannot say:
#
# - The embedded model's texts and questions are made of words drawn at random, so there is little to learn from
#   an instruction, and unmasked loss spends most of its weight on what nobody could predict. Real instructions
#   hold more. Whether it helps to learn them is to be tried there: put your own model and data into the switch.
# - Passages and questions look like the text that the base model was made from. Loss on them is training on old
#   text, a known guard against forgetting, so look at both panels: a mode may learn the same and forget less.
# - The published results disagree too: in "On the Effect of Instruction Tuning Loss on Generalization" loss on
#   everything beats masked loss in 7 of 15 settings, and each of these is a single run.
