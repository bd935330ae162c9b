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
# # Start in five minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/mora-jax/blob/main/notebooks/start.ipynb)
#
# Put MoRA on a language model, train it on instructions, ask it something before and after, and save what was
# trained. Model and data are embedded in the package (a Llama of 785 thousand parameters), so nothing is
# downloaded, and a CPU is enough.

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

import matplotlib.pyplot as plt
from flax import nnx
from matplotlib.patches import Rectangle

import mora_jax as mj
from mora_jax import demo
from mora_jax.data import load_rows
from mora_jax.evaluation import generate_batch

# %% [markdown]
# ## What MoRA is, in one picture
#
# A layer's matrix W stays as it is. LoRA adds the product of two thin matrices, A and B: with rank 8 the update has
# at most rank 8. MoRA trains one square matrix M with as many numbers, on inputs that were summed up in groups
# (`sharing`) or cut into rotated pieces (`rotation`): its update can have a rank as high as M's side, or higher.

# %%
inputs, outputs, rank = 576, 1536, 8  # an MLP's layer in SmolLM2-135M
side = round(((inputs + outputs) * rank) ** 0.5)
parts = {
    f"W, frozen: {inputs * outputs:,} numbers": [(0, 0, outputs, inputs)],
    f"LoRA: {rank * (inputs + outputs):,} numbers": [(0, 0, rank, inputs), (120, 284, outputs, rank)],
    f"MoRA: {side * side:,} numbers": [((outputs - side) / 2, (inputs - side) / 2, side, side)],
}
figure, panels = plt.subplots(1, 3, figsize=(10, 1.8), layout="constrained")
for axes, (title, boxes) in zip(panels, parts.items(), strict=True):
    for x, y, width, height in boxes:
        colour = "lightgrey" if "frozen" in title else "tab:orange"
        axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="black"))
    axes.set(title=title, xlim=(-20, 1700), ylim=(-20, 600), aspect="equal")
    axes.axis("off")
plt.show()

# %% [markdown]
# ## Attach
#
# `load_pretrained` takes any HuggingFace folder or hub id of a supported family. `attach` puts an adapter on every
# layer that `targets` names (all linear ones by default) and says what matched. A fresh adapter changes no output.

# %%
MODEL = demo.model_path()  # or a hub id, such as "HuggingFaceTB/SmolLM2-135M-Instruct"
config = mj.MoRAConfig(rank=8, kind="rotation")
model, tokenizer = mj.load_pretrained(MODEL, dtype="float32")
print(mj.attach(model, config, rngs=nnx.Rngs(0)))

# %% [markdown]
# ## Ask before
#
# The test questions occur neither in the training rows nor in the text that the base model was made from. The base
# has never seen a question.

# %%
test = load_rows([demo.data_path("test")])[::60][:4]
questions = [row.messages[0].content for row in test]
before = generate_batch(model, tokenizer, questions, max_new_tokens=24)
for question, answer in zip(questions, before, strict=True):
    print(f"{question}\n  before: {answer.strip()}")

# %% [markdown]
# ## Train
#
# `finetune` is the loop of the command `mora-jax train`. The model carries adapters already, so these are trained.
# Only the answers carry loss (`masked`). Any key of the command's configuration can be given.

# %%
result = mj.finetune(
    model,
    demo.data_path("train"),
    tokenizer=tokenizer,
    loss="masked",
    eval_rows=demo.data_path("held_out"),
    steps=100,
    batch_size=16,
    learning_rate=6e-3,
    config={"optimizer.warmup_steps": 10, "train.eval_every": 25, "data.max_length": 32},
)
result.plot()

# %% [markdown]
# ## Ask after

# %%
after = generate_batch(result.model, tokenizer, questions, max_new_tokens=24)
for row, question, old, new in zip(test, questions, before, after, strict=True):
    right = row.messages[1].content
    print(f"{question}\n   right: {right}\n  before: {old.strip()}\n   after: {new.strip()}")

# %% [markdown]
# ## Save, load, merge
#
# An adapter folder has PEFT's layout (MoRA: that of its authors). A merged model is an ordinary HuggingFace folder,
# for `transformers` and vLLM.

# %%
out = pathlib.Path(tempfile.mkdtemp())
result.save(out / "adapter")

again, _ = mj.load_pretrained(MODEL, dtype="float32")
mj.load_adapter(again, out / "adapter")
mj.merge(again)
mj.save_pretrained(again, out / "merged", tokenizer)

merged, _ = mj.load_pretrained(out / "merged", dtype="float32")
assert generate_batch(merged, tokenizer, questions, max_new_tokens=24) == after
print(*sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()), sep="\n")

# %% [markdown]
# ## Where to go on
#
# - *Memory: LoRA against MoRA at equal parameters* (`memory.ipynb`): when MoRA is worth a try.
# - *LoRA, MoRA and full: learning and forgetting* (`learning_and_forgetting.ipynb`): a fair comparison, with seeds.
# - *Which tokens should carry loss?* (`loss_tokens.ipynb`), *Adapters in your own Flax model* (`own_model.ipynb`),
#   *From PEFT and back, vLLM, GGUF* (`peft_and_back.ipynb`), *On a TPU* (`tpu.ipynb`).
