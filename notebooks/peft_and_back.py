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
# # From PEFT and back, vLLM, GGUF
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/mora-jax/blob/main/notebooks/peft_and_back.ipynb)
#
# An adapter here *is* a PEFT folder. This notebook reads one, trains it on, writes it again, asks what vLLM,
# SGLang, llama.cpp and PEFT would do with it, makes a LoRA of a MoRA, and merges for servers. Where torch and PEFT
# are installed, as on Colab, PEFT itself loads what was written and has to give the same logits.

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
import importlib.util
import json
import tempfile

import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import mora_jax as mj
from mora_jax import demo
from mora_jax.interop.convert import convert_to_lora
from mora_jax.interop.engine_check import check_folder

MODEL = demo.model_path()  # or a hub id, such as "HuggingFaceTB/SmolLM2-135M-Instruct"
out = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## A folder in PEFT's layout
#
# As PEFT would, we leave an `adapter_config.json` and an `adapter_model.safetensors`: LoRA of rank 4 on the queries
# and values. A folder that PEFT wrote, or a hub id of one, goes the same way.

# %%
model, tokenizer = mj.load_pretrained(MODEL, dtype="float32")
mj.attach(model, mj.LoRAConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj")), rngs=nnx.Rngs(0))
mj.save_adapter(model, out / "from_peft")
settings = json.loads((out / "from_peft" / "adapter_config.json").read_text())
print({key: settings[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")})

# %% [markdown]
# ## Train it on
#
# `load_adapter` reads everything from the folder: method, rank, targets. A field that changes the result and isn't
# supported is refused by its name, never dropped.

# %%
model, tokenizer = mj.load_pretrained(MODEL, dtype="float32")
mj.load_adapter(model, out / "from_peft")
result = mj.finetune(
    model,
    demo.data_path("train"),
    tokenizer=tokenizer,
    steps=60,
    batch_size=16,
    learning_rate=1e-2,
    config={"data.max_length": 32, "optimizer.warmup_steps": 5},
)
result.save(out / "lora")
result.plot()

# %% [markdown]
# ## The same logits in PEFT

# %%
ids = tokenizer("The opposite of wet:", return_tensors="np")["input_ids"]
logits = np.asarray(result.model(ids))
if all(importlib.util.find_spec(name) for name in ("torch", "peft")):
    import warnings

    import peft
    import torch
    import transformers

    warnings.simplefilter("ignore")  # of PEFT and transformers about each other
    transformers.utils.logging.disable_progress_bar()
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    other = peft.PeftModel.from_pretrained(base, out / "lora").eval()
    with torch.no_grad():
        difference = np.abs(other(torch.tensor(ids)).logits.numpy() - logits).max()
    print(f"largest difference of logits: {difference:.1e}")
    assert difference < 1e-3
else:
    print("torch and peft are not installed here: nothing to compare with")

# %% [markdown]
# ## Preflight: what would a server do with this folder?
#
# `mora-jax check` knows by which rules each program loads adapters, and says which tensors it uses, drops, refuses or
# misreads. LoRA passes everywhere.


# %%
def preflight(folder):
    for program in ("peft", "vllm", "sglang", "llama.cpp"):
        findings = check_folder(folder, program).findings
        print(f"{program}: " + (str(findings[0]) if findings else "loads all of it"))


preflight(out / "lora")

# %% [markdown]
# ## MoRA for servers
#
# Stock PEFT and the servers know no MoRA. There are two ways: merge it into the model, or make a LoRA of it. Kind
# `sharing` has an exact LoRA whose rank is the side of M; a smaller rank costs something, and `convert` says how
# much.

# %%
model, tokenizer = mj.load_pretrained(MODEL, dtype="float32")
result = mj.finetune(
    model,
    demo.data_path("train"),
    mj.MoRAConfig(rank=4, kind="sharing", targets=("q_proj", "v_proj")),
    tokenizer=tokenizer,
    steps=60,
    batch_size=16,
    learning_rate=1e-2,
    config={"data.max_length": 32, "optimizer.warmup_steps": 5},
)
result.save(out / "mora")
preflight(out / "mora")

# %%
errors = {}
for rank in (2, 4, 8, 16, None):
    model, _ = mj.load_pretrained(MODEL, dtype="float32")
    mj.load_adapter(model, out / "mora")
    conversion = convert_to_lora(model, rank=rank)
    errors["exact" if rank is None else str(rank)] = conversion.error
    mj.save_adapter(model, out / f"mora_as_lora_{rank}")
preflight(out / "mora_as_lora_None")

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.bar(list(errors), [100 * error for error in errors.values()], color="#0072B2")
axes.set(xlabel="rank of the LoRA", ylabel="part of the update that is lost, %", title="MoRA of rank 4 as a LoRA")
plt.show()

# %% [markdown]
# ## Merged models, vLLM and GGUF
#
# A merged folder is an ordinary HuggingFace model. `vllm serve` takes it, and llama.cpp's converters make GGUF
# files of it, or of a LoRA folder beside its base:
#
# ```sh
# vllm serve merged
# vllm serve BASE --enable-lora --lora-modules mine=lora
# python convert_hf_to_gguf.py merged --outfile merged.gguf            # of llama.cpp
# python convert_lora_to_gguf.py lora --base BASE --outfile lora.gguf  # then llama-cli -m base.gguf --lora lora.gguf
# ```

# %%
mj.merge(result.model)
mj.save_pretrained(result.model, out / "merged", tokenizer)
again, _ = mj.load_pretrained(out / "merged", dtype="float32")
print(*sorted(path.name for path in (out / "merged").iterdir()), sep=", ")
print("vllm:", check_folder(out / "merged", "vllm").findings or "loads all of it")
