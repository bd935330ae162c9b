"""What it takes to load a large model: seconds, bytes read from disk, peak memory.

    python benchmarks/model_load.py --shapes qwen2.5-7b --work /somewhere/with/room

Writes a folder with the shapes of a published model and random numbers in bfloat16 (`--work`, which needs room for it),
and loads it once for each way of holding the weights, in a process of its own. Linux drops what it remembers of the
files before each (only root may ask for that; else bytes from disk say nothing, and the table says so). Peak memory is
that of this process without the pages of files, which the system can drop: `RssAnon`, looked at every 50 ms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from mora_jax.interop.load import load_pretrained
from mora_jax.interop.tensor_map import tensor_plan
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.planning.model_shapes import read_model

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--shapes qwen2.5-7b --work {work}"
QUICK = "--shapes smollm2-135m"
SHARD = 5_000_000_000  # bytes of one file, as HuggingFace writes them
CASES = (("bfloat16", "none"), ("bfloat16", "int8"), ("bfloat16", "nf4"))


def write(folder: Path, shapes: str) -> int:
    """Makes the folder; returns the bytes of its tensors."""
    values = read_model(shapes)
    (folder / "config.json").write_text(json.dumps(values))
    model = nnx.eval_shape(lambda: Decoder(read_config(values, shapes), dtype="bfloat16", rngs=None))
    numbers = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(ml_dtypes.bfloat16)
    shards: list[dict[str, np.ndarray]] = [{}]
    sizes = [0]
    for piece in (piece for entry in tensor_plan(model) for piece in entry.pieces):
        size = 2 * int(np.prod(piece.shape))
        if sizes[-1] + size > SHARD and sizes[-1]:
            save(folder, shards[-1], len(shards))
            shards[-1] = dict.fromkeys(shards[-1])
            shards.append({})
            sizes.append(0)
        shards[-1][piece.name] = np.resize(numbers, piece.shape)
        sizes[-1] += size
    save(folder, shards[-1], len(shards))
    index = {name: file_name(number) for number, shard in enumerate(shards, 1) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(sizes)


def file_name(number: int) -> str:
    """Of one file."""
    return f"model-{number:05}.safetensors"


def save(folder: Path, tensors: dict[str, np.ndarray], number: int) -> None:
    """Writes one file."""
    save_file(tensors, folder / file_name(number), metadata={"format": "pt"})


def forgotten() -> bool:
    """Has Linux drop what it remembers of files; False where it may not be asked."""
    try:
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def anonymous() -> int:
    """Bytes of this process that are in memory and of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def bytes_read() -> int:
    """Bytes that this process has had from disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def load(folder: str, dtype: str, quantize: str) -> None:
    """Loads the folder and prints a JSON object: seconds, bytes from disk, peak and final memory."""
    before, read = anonymous(), bytes_read()
    most, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.perf_counter()
    model, _ = load_pretrained(folder, dtype=dtype, quantize=quantize)
    seconds = time.perf_counter() - start
    done.set()
    watching.join()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    found = {"seconds": seconds, "read": bytes_read() - read, "held": held, "peak": most[0] - before}
    print(json.dumps(found))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", required=True, help="a name that `mora-jax plan --model` knows")
    parser.add_argument("--work", type=Path, help="a folder for the weights; they are removed again")
    parser.add_argument("--load", nargs=3, metavar=("FOLDER", "DTYPE", "QUANTIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(*args.load)
        return
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        size = write(Path(name), args.shapes)
        print(f"{args.shapes}: {size / 1e9:.2f} GB in files\n", flush=True)
        print("| held as | seconds | GB from disk | GB held | peak GB besides files |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for dtype, quantize in CASES:
            known = forgotten()
            call = [sys.executable, __file__, "--shapes", args.shapes, "--load", name, dtype, quantize]
            said = json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout)
            read = f"{said['read'] / 1e9:.2f}" if known else "unknown"
            memory = f"{said['held'] / 1e9:.2f} | {said['peak'] / 1e9:.2f}"
            held = dtype if quantize == "none" else quantize
            print(f"| {held} | {said['seconds']:.1f} | {read} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
