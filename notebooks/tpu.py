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
# # On a TPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/mora-jax/blob/main/notebooks/tpu.ipynb)
#
# Choose a TPU runtime first (Colab: Runtime, Change runtime type, v5e-1 TPU), then run the cells from the top. It
# checks the machine, plans what fits, trains across all chips with checkpoints, goes on after a stop, and prints
# tokens a second for each chip in a form that you can send to the project: nothing was timed on TPUs there yet.
#
# Without a TPU everything runs on what there is, smaller: what you see here is from a CPU.

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
import os
import signal
import tempfile
import time

import matplotlib.pyplot as plt

from mora_jax import demo

# %% [markdown]
# ## The machine
#
# Everything goes through the command `mora-jax`, so that this notebook's own process leaves the TPU to it: only one
# process at a time can have it. `doctor` says what is there and what is wrong. If it finds a `cpu` on a TPU
# runtime, another jax was installed over the one with the TPU's plugin: start a new runtime.


# %%
def command(*words):
    """What `mora-jax` prints."""
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    return subprocess.run(
        ["mora-jax", *words], env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout


doctor = dict(line.split(maxsplit=1) for line in command("doctor").splitlines() if "  " in line)
print(*(f"{name}: {doctor[name]}" for name in ("device", "jax", "jaxlib", "flax", "libtpu")), sep="\n")
on_tpu = "tpu" in doctor["device"].lower()
chips = int(doctor["device"].split()[0])

# %% [markdown]
# ## Plan before you train
#
# `plan` computes memory and time by formula for a model, a method and a machine, also for one that you don't have
# yet. Here for one chip of v5e, which has 16 GB.

# %%
for model in ("gemma3-1b", "qwen3-8b"):
    words = ["--model", model, "--accelerator", "v5e-1", "--tries", "0", "--json"]
    plan = json.loads(command("plan", *words, "--config.adapter.method=mora", "--config.adapter.rank=8"))
    total, usable = (plan["configured"][name] / 1e9 for name in ("total_bytes", "usable_bytes"))
    print(f"{model}: {total:.1f} of {usable:.1f} GB. {plan['verdict']}")

# %% [markdown]
# ## Train, and be stopped
#
# `mesh.data=-1`, the default, gives each chip its share of the rows when they divide; `mesh.fsdp` shards the
# weights too. On a TPU this takes SmolLM2-135M from the hub, elsewhere the embedded model. When the first
# checkpoint is there, the process is killed, as if the runtime had ended.

# %%
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct" if on_tpu else demo.model_path()
ROWS, LENGTH, STEPS = (32, 512, 90) if on_tpu else (16, 32, 90)
run = pathlib.Path(tempfile.mkdtemp()) / "run"  # on Colab rather a folder of Drive, which outlives the machine
settings = {
    "model.path": MODEL,
    "data.train": demo.data_path("train"),
    "data.max_length": LENGTH,
    "data.packing": "true",
    "adapter.method": "mora",
    "adapter.rank": 8,
    "optimizer.learning_rate": 3e-3,
    "train.steps": STEPS,
    "train.batch_size": ROWS,
    "train.save_every": STEPS // 3,
    "mesh.data": -1,
    "out": run,
}
words = [f"--config.{key}={value}" for key, value in settings.items()]
process = subprocess.Popen(["mora-jax", "train", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
checkpoint = run / "checkpoints" / str(STEPS // 3)
while process.poll() is None and not checkpoint.exists():
    time.sleep(0.05)
process.send_signal(signal.SIGKILL)
process.wait()
print("checkpoints:", *sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit()))

# %% [markdown]
# ## Go on where it stopped
#
# `--resume` continues at the exact row of the data, with the same numbers as without the stop, bit for bit.

# %%
command("train", "--resume", str(run))
metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
summary = json.loads((run / "summary.json").read_text())
steps = [row for row in metrics if "loss" in row]
print(f"{len(steps)} steps, resumed after step {summary['resumed_after']}")

figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
axes.plot([row["step"] for row in steps], [row["loss"] for row in steps], color="#0072B2")
axes.axvline(STEPS // 3, color="grey", linestyle=":")
place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
axes.annotate("stopped, and went on", (STEPS // 3, 0.9), (5, 0), **place)
axes.set(xlabel="step", ylabel="loss, nats a token")
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Tokens a second, to send
#
# Copy the line below into an issue of the project, whatever it says. Times of a CPU are of no interest, so there
# only the form is shown.

# %%
report = {
    "device": doctor["device"],
    "jax": doctor["jax"],
    "model": pathlib.Path(MODEL).name,
    "method": summary["method"],
    "rows_by_tokens": [ROWS, LENGTH],
    "tokens_per_second_per_chip": round(summary["tokens_per_second"] / chips) if on_tpu else None,
    "mfu": summary["mfu"],
    "compile_seconds": round(summary["compile_seconds"], 1) if on_tpu else None,
}
print(json.dumps(report, ensure_ascii=False))
