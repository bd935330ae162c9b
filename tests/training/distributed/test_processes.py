"""Several real processes on this machine: they train as one, stop together, and go on in any number."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mora_jax.cli.main import main
from tests.evaluation import tiny
from tests.training.launching import ROOT, Ended, ended, environment, free_port, run, started, wait_for

WORDS = ("red", "blue", "green", "black", "grey")
ROWS = [{"instruction": f"Say {word}", "input": "", "output": word} for word in WORDS]
STEPS = 150


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_folder(folder / "model")
    (folder / "rows.json").write_text(json.dumps(ROWS * 4))
    return folder


def arguments(inputs: Path, out: Path | str, **settings) -> list[str]:
    values = {
        "model.path": inputs / "model",
        "model.dtype": "float32",
        "data.train": inputs / "rows.json",
        "out": out,
        "train.steps": STEPS,
        "train.batch_size": 8,
        "adapter.rank": 2,
        "adapter.targets": "q_proj,down_proj",
        "optimizer.schedule": "constant",
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    return [f"--config.{name}={value}" for name, value in values.items()]


def alone(arguments: list[str], **settings) -> None:
    """Runs in this process on one device."""
    more = {"mesh.data": 1, **{name.replace("__", "."): value for name, value in settings.items()}}
    assert main(["train", *arguments, *(f"--config.{name}={value}" for name, value in more.items())]) == 0


def losses(out: Path) -> dict[int, float]:
    """By step; every step occurs once."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return dict(found)


def same_run(out: Path, expected: Path) -> None:
    """The same losses and the same adapter, up to the rounding of another order of sums."""
    ours, theirs = losses(out), losses(expected)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    weights, wanted = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (out, expected))
    assert weights.keys() == wanted.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-3, atol=1e-5, err_msg=name)


def codes(found: list[Ended]) -> list[int]:
    return [process.code for process in found]


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "alone"
    alone(arguments(inputs, out, train__save_every=0))
    return out


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_one_goes_on(inputs, unbroken, tmp_path):
    out = tmp_path / "run"
    given = arguments(inputs, out, mesh__data=2, mesh__fsdp=2, train__micro_batch_size=4, train__save_every=0)
    with started([given] * 2) as processes:
        wait_for(out / "metrics.jsonl", '"step": 3,', processes[0])
        processes[1].send_signal(signal.SIGTERM)
        first, second = ended(processes)
    assert first.code == second.code == 143, (first, second)
    assert "--resume" in first.stderr and "step 3/" in first.stderr
    assert second.stderr == ""  # process 0 alone speaks
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert 3 < int(checkpoint.name) < STEPS and max(losses(out)) == int(checkpoint.name)
    config = json.loads((out / "config.json").read_text())
    config["mesh"] |= {"data": 1, "fsdp": 1}
    (out / "config.json").write_text(json.dumps(config))  # one process here, on one device
    assert main(["train", "--resume", str(out)]) == 0
    same_run(out, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_four_go_on_with_another_mesh(inputs, unbroken, tmp_path, victim):
    out = tmp_path / "run"
    given = arguments(inputs, out, mesh__data=1, mesh__tensor=4, train__save_every=10)
    with started([given] * 2) as processes:
        wait_for(out / "metrics.jsonl", '"step": 15,', processes[0])
        processes[victim].kill()
        killed = time.monotonic()
        other = ended([processes[1 - victim]])[0]
        seconds = time.monotonic() - killed
    assert other.code not in (0, 1, 2), other
    assert seconds < 60
    if victim == 1:
        assert other.code == 75
        assert (
            f"error: process 1 of 2 is gone, so process 0 stops too; start all processes again with mora-jax train "
            f"--resume {out}" in other.stderr
        )
    else:  # the coordinator: JAX may be faster to say so than the watch
        assert "process 0 of 2 is gone" in other.stderr or "another task died" in other.stderr
    config = json.loads((out / "config.json").read_text())
    config["mesh"] |= {"data": 2, "fsdp": 2, "tensor": 2}
    (out / "config.json").write_text(json.dumps(config))
    assert codes(run(["--resume", str(out)], 4)) == [0] * 4
    same_run(out, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, {"mesh__data": 4}),
        (4, {"mesh__data": 8}),
        (4, {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2, "data__packing": "true"}),
        (4, {"mesh__data": 1, "mesh__tensor": 8, "adapter__method": "mora", "train__micro_batch_size": 2}),
        (2, {"mesh__data": 1, "mesh__tensor": 4, "adapter__method": "pissa"}),
    ],
)
def test_every_layout_trains_as_one_process(inputs, tmp_path, processes, settings):
    (tmp_path / "words.jsonl").write_text("".join(f'{{"text": "Say the word {n}"}}\n' for n in range(5)))
    settings = {"adapter__targets": "all-linear", "train__steps": 6, "data__eval_fraction": 0.2} | settings
    settings["train__eval_tasks"] = f"lambada={tmp_path / 'words.jsonl'}"
    given = arguments(inputs, tmp_path / "run", **settings)
    found = run(given, processes)
    assert codes(found) == [0] * processes, found
    whole = [f"--config.out={tmp_path / 'alone'}", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"]
    alone([*given, *whole])
    same_run(tmp_path / "run", tmp_path / "alone")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "alone")]
    for name in ("eval_loss", "eval_lambada_perplexity"):
        np.testing.assert_allclose(summaries[0][name], summaries[1][name], rtol=1e-5)


@pytest.mark.slow
def test_processes_that_do_not_fit_together_are_refused(inputs, tmp_path):
    out = tmp_path / "run"
    with started([arguments(inputs, out), arguments(inputs, out, seed=1)]) as processes:
        found = ended(processes)
    assert codes(found) == [2, 2]
    for process in found:
        assert "process 1 differs from process 0 in its configuration" in process.stderr
    assert not out.exists()
    # Only one of them finds its data: it says so, and the other doesn't wait for it.
    with started([arguments(inputs, out), arguments(inputs, out, data__train="absent.json")]) as processes:
        found = ended(processes)
    assert codes(found) == [2, 2]
    assert "error: process 1 of 2 failed" in found[0].stderr and "absent.json" in found[0].stderr
    # Two hosts, each with a folder of that name.
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with started([arguments(inputs, "run")] * 2, cwd=folders) as processes:
        found = ended(processes)
    assert codes(found) == [2, 2]
    # Each says it of its own folder, or passes on what the other said.
    assert all(f"process 1 can't see the run directory {tmp_path}" in process.stderr for process in found)
    assert not any(list(folder.iterdir()) for folder in folders)


@pytest.mark.slow
def test_a_cut_mesh_goes_on_as_another(inputs, unbroken, tmp_path):
    out = tmp_path / "run"
    given = arguments(inputs, out, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, train__save_every=10)
    with started([given], devices=8, join=False) as processes:
        wait_for(out / "metrics.jsonl", '"step": 25,', processes[0])
        processes[0].kill()
        processes[0].wait()
    config = json.loads((out / "config.json").read_text())
    config["mesh"] |= {"data": 1, "fsdp": 4}
    (out / "config.json").write_text(json.dumps(config))
    assert codes(run(["--resume", str(out)], 1, devices=8)) == [0]
    same_run(out, unbroken)


JOIN = """
import sys
from mora_jax.training.distributed.processes import Cluster
from mora_jax.training.distributed.processes import join
join(Cluster("the command line", sys.argv[1], int(sys.argv[2]), 2), patience=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "index", "words"),
    [
        ("127.0.0.1:1", 1, "error: process 0 can't be reached at 127.0.0.1:1 (Connection refused) within 2 s"),
        ("nobody.invalid:1234", 1, "error: process 0 can't be reached at nobody.invalid:1234"),
        ("127.0.0.1:{port}", 0, "error: process 0 answers at 127.0.0.1:{port}, but not all of 2 processes came"),
    ],
    ids=["refused", "unknown", "alone"],
)
def test_nobody_waits_forever(address, index, words):
    port = free_port()
    command = [sys.executable, "-c", JOIN, address.format(port=port), str(index)]
    done = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=120)
    assert done.returncode == 75
    assert done.stderr.startswith(words.format(port=port))


SCATTERED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mora_jax.training.distributed.processes import read_flags
from mora_jax.training.sharding.mesh import put_rows, rows_here
from mora_jax.training.distributed.processes import gather, start
watch = start(read_flags(sys.argv[1], int(sys.argv[2]), 2))
# Neighbours on a TPU's grid may belong to different hosts.
devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(4, 1)
rows = NamedSharding(Mesh(devices, ("data", "tensor")), PartitionSpec(None, "data"))
here = rows_here(rows, 8)
assert here == ((0, 1, 4, 5) if watch.index == 0 else (2, 3, 6, 7)), here
batch = np.arange(3 * 8 * 5).reshape(3, 8, 5).astype(np.int32)
placed = put_rows({"x": batch[:, here]}, rows, here, 8)["x"]
for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, batch[shard.index])
whole = jax.jit(lambda x: x, out_shardings=NamedSharding(rows.mesh, PartitionSpec()))(placed)
np.testing.assert_array_equal(whole, batch)
watch.close()
"""


@pytest.mark.slow
def test_rows_of_a_process_need_not_be_neighbours():
    command = [sys.executable, "-c", SCATTERED, f"127.0.0.1:{free_port()}"]
    both = [subprocess.Popen([*command, str(index)], cwd=ROOT, env=environment(2)) for index in range(2)]
    assert [process.wait(timeout=240) for process in both] == [0, 0]
