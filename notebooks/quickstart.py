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
# # mora-jax in one notebook
#
# Attach LoRA or MoRA to a language model, fine-tune it on instructions, look at the curves, ask it something, and
# export the adapter and the merged model. The model and the data are embedded in the package: a Llama of about a
# million parameters that this project's own trainer made, so that everything runs in a few minutes on a CPU.

# %% [markdown]
# The package, if it is missing (on Colab, say): from the clone that this notebook is in, or from a wheel beside it,
# which `pip wheel --no-deps .` makes in a clone.

# %%
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("mora_jax") is None:
    wheel = next(pathlib.Path().absolute().glob("mora_jax-*.whl"), None)
    source = ".." if pathlib.Path("../pyproject.toml").exists() else wheel
    assert source, "put a wheel of mora_jax beside this notebook"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"{source}[plots]"], check=True)

# %%
import tempfile

import matplotlib.pyplot as plt
from flax import nnx

import mora_jax as mj
from mora_jax import demo
from mora_jax.data import EncodedDataset, load_rows
from mora_jax.evaluation import stream_text

# %% [markdown]
# ## Attach
#
# `load_pretrained` takes any HuggingFace folder of a supported family. `attach` puts an adapter on every layer that
# `targets` names (all linear ones by default) and returns a report. MoRA at rank 8 trains one square matrix a layer
# with about as many parameters as the two thin ones of LoRA at rank 8.

# %%
configs = {
    "LoRA": (mj.LoRAConfig(rank=8, alpha=16.0), 1e-2),
    "MoRA, rotation": (mj.MoRAConfig(rank=8, kind="rotation"), 3e-3),
}
model, tokenizer = mj.load_pretrained(demo.model_path(), dtype="float32")
print(mj.attach(model, configs["MoRA, rotation"][0], rngs=nnx.Rngs(0)))

# %% [markdown]
# ## Data
#
# Each conversation is rendered once with the tokenizer's chat template. With the masked loss only the answer's tokens
# count, and the end-of-turn token that closes it.

# %%
rows = load_rows([demo.data_path("train")])
dataset = EncodedDataset.build(rows, tokenizer, mode="masked")
print(dataset.report)
example = dataset[0]
for token, weight in zip(example.input_ids, example.weights, strict=True):
    print(f"{weight:3.0f}  {tokenizer.decode([int(token)])!r}")

# %% [markdown]
# ## Train
#
# `finetune` attaches the adapters and trains them by the loop of `mora-jax train`. The step is compiled once; optax
# sees the adapters only. Any key of the command's configuration can be given.

# %%
results = {}
for name, (config, learning_rate) in configs.items():
    results[name] = mj.finetune(
        demo.model_path(),
        demo.data_path("train"),
        config,
        loss="masked",
        steps=100,
        batch_size=16,
        learning_rate=learning_rate,
        config={"model.dtype": "float32", "optimizer.warmup_steps": 10, "train.log_every": 10},
    )
models = {name: result.model for name, result in results.items()}
for name, result in results.items():
    trained, loss = result.summary["trainable_parameters"], result.summary["final_loss"]
    print(f"{name}: {trained:,} trained parameters, last loss {loss:.3f}")

# %% [markdown]
# ## Plot

# %%
figure, axes = plt.subplots(figsize=(7, 4))
for (name, result), line in zip(results.items(), ("-", "--"), strict=True):
    axes.plot([row["step"] for row in result.metrics], [row["loss"] for row in result.metrics], line, label=name)
axes.set(xlabel="step", ylabel="loss on the answer's tokens", ylim=(0, None))
axes.legend()
plt.show()

# %% [markdown]
# ## Generate
#
# The test questions occur neither in the training rows nor in the text that the base model was made from.

# %%
base, _ = mj.load_pretrained(demo.model_path(), dtype="float32")
test = load_rows([demo.data_path("test")])


def ask(model, question):
    return "".join(stream_text(model, tokenizer, question, max_new_tokens=24)).strip()


for row in test[::60][:4]:
    question, answer = row.messages[0].content, row.messages[1].content
    print(f"{question}\n  right: {answer}\n  base: {ask(base, question)}")
    for name, trained in models.items():
        print(f"  {name}: {ask(trained, question)}")

# %% [markdown]
# ## Export
#
# An adapter folder has PEFT's layout (MoRA: that of its authors). A merged model is an ordinary HuggingFace folder.

# %%
out = pathlib.Path(tempfile.mkdtemp())
results["LoRA"].save(out / "adapter")

again, _ = mj.load_pretrained(demo.model_path(), dtype="float32")
mj.load_adapter(again, out / "adapter")
question = test[0].messages[0].content
assert ask(again, question) == ask(models["LoRA"], question)

mj.merge(again)
mj.save_pretrained(again, out / "merged", tokenizer)
merged, _ = mj.load_pretrained(out / "merged", dtype="float32")
print(ask(merged, question))
print(sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()))
