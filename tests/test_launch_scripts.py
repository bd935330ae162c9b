"""The scripts for TPU VMs, SLURM and GKE, with stand-ins for gcloud, kubectl, srun and scontrol."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[1] / "scripts" / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
TRAIN = "--config c.py --config.data.train='a b',x"


def stand_in(folder: Path, name: str, body: str = "") -> None:
    """A program that notes its arguments, one line a call, and then does what `body` says."""
    file = folder / name
    file.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >> "{folder}/calls"\n{body}\n')
    file.chmod(0o755)


@pytest.fixture
def tools(tmp_path):
    """A folder for stand-ins, at the head of the path."""
    folder = tmp_path / "tools"
    folder.mkdir()
    return folder


def run(tools: Path, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tools), **settings}
    return subprocess.run(["bash", LAUNCH / script, *arguments], env=env, capture_output=True, text=True, timeout=60)


def calls(tools: Path) -> list[str]:
    file = tools / "calls"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_syntax(script):
    assert subprocess.run(["bash", "-n", LAUNCH / script], check=False).returncode == 0
    if shutil.which("shellcheck"):  # in the extra `lint`
        assert subprocess.run(["shellcheck", LAUNCH / script], check=False).returncode == 0


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh"])
def test_without_arguments_the_settings_are_listed(tools, script):
    done = run(tools, script)
    assert done.returncode == 2 and "NAME" in done.stderr and "(required)" in done.stderr


def test_a_missing_setting_is_named(tools):
    done = run(tools, "tpu_vm.sh", "create", NAME="a", ZONE="z", BUCKET="gs://b")
    assert (done.returncode, done.stderr.split(" (")[0]) == (2, "error: set TRAIN")
    done = run(tools, "gke.sh", "show", NAME="a")
    assert (done.returncode, done.stderr.split(" (")[0]) == (2, "error: set IMAGE")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["--node-id=r", "--spot", "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e"]),
        ({"SLICES": "2", "SPOT": "0"}, ["--node-count=2", "--node-prefix=r"]),
        ({"TYPE": "v5p-64"}, ["--accelerator-type=v5p-64", "--runtime-version=v2-alpha-tpuv5 "]),
        ({"TYPE": "v5litepod-16"}, ["--runtime-version=v2-alpha-tpuv5-lite"]),
    ],
    ids=["spot", "slices", "v5p", "v5e"],
)
def test_a_request_for_tpus(tools, settings, words):
    stand_in(tools, "gcloud")
    done = run(tools, "tpu_vm.sh", "create", NAME="r", ZONE="z", BUCKET="gs://b/runs/", TRAIN=TRAIN, **settings)
    assert done.returncode == 0, done.stderr
    (call,) = calls(tools)
    for word in [*words, "queued-resources create r --zone=z", f"|mora-bucket=b/runs|mora-files=|mora-train={TRAIN}|"]:
        assert word in call
    assert ("--spot" in call) == (settings.get("SPOT") != "0")
    assert (LAUNCH / "tpu_startup.sh").samefile(call.split("startup-script=")[1])


def test_watching_asks_again_for_machines_that_were_taken(tools):
    # Each look at the request finds the next state; when the run is finished, its summary is there.
    states = ["ACTIVE", "SUSPENDED", "", "PROVISIONING", "ACTIVE"]
    body = f"""
    case "$*" in
      *describe*)
        echo x >> {tools}/looks; n=$(wc -l < {tools}/looks)
        state=$(echo {",".join(states)} | cut -d, -f"$n"); [ -n "$state" ] && echo "$state" ;;
      *"storage ls gs://b/r/summary.json"*) [ "$(wc -l < {tools}/looks)" -ge {len(states)} ] ;;
    esac"""
    (tools / "looks").touch()
    stand_in(tools, "gcloud", body)
    done = run(tools, "tpu_vm.sh", "watch", NAME="r", ZONE="z", BUCKET="gs://b", TRAIN=TRAIN, INTERVAL="0")
    assert done.returncode == 0, done.stderr
    actions = [call.split()[4] for call in calls(tools) if "queued-resources" in call and "describe" not in call]
    assert actions == ["delete", "create", "delete"]


@pytest.mark.parametrize(
    ("found", "code", "call", "end"),
    [
        (None, 0, "mora-jax train --config c.py --config.out={out}", 0),
        ("config.json", 0, "mora-jax train --resume {out}", 0),
        ("config.json", 143, "mora-jax train --resume {out}", 143),
        (None, 2, "mora-jax train --config c.py --config.out={out}", 2),
        ("summary.json", 0, None, 0),
    ],
    ids=["start", "resume", "preempted", "wrong", "finished"],
)
def test_slurm(tools, tmp_path, found, code, call, end):
    out = tmp_path / "run"
    out.mkdir()
    if found:
        (out / found).touch()
    stand_in(tools, "srun", f"exit {code}")
    stand_in(tools, "scontrol")
    done = run(tools, "slurm.sbatch", "--config", "c.py", OUT=str(out), SLURM_JOB_ID="7")
    assert done.returncode == end, done.stderr
    expected = [] if call is None else [f"srun --kill-on-bad-exit=1 {call.format(out=out)}"]
    assert calls(tools) == expected + (["scontrol requeue 7"] if end == 143 else [])


def test_the_manifest_is_filled_in(tools):
    done = run(tools, "gke.sh", "show", NAME="r", IMAGE="i:1", BUCKET="b", TRAIN=TRAIN, SLICES="2", HOSTS="8")
    manifest = yaml.safe_load(done.stdout)
    assert not any("${" in line for line in done.stdout.splitlines() if not line.startswith("#"))
    assert manifest["kind"] == "JobSet" and manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "default"
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == 2 and job["template"]["spec"]["completions"] == 8
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert {entry["name"]: entry["value"] for entry in container["env"]} == {
        "OUT": "gs://b/r",
        "SEEN": "/runs/r",
        "TRAIN": TRAIN,
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize(
    ("begun", "expected"), [(False, "train --config c.py --config.out={out}"), (True, "train --resume {out}")]
)
def test_a_pod_starts_or_resumes(tools, tmp_path, begun, expected):
    manifest = yaml.safe_load((LAUNCH / "gke_tpu.yaml").read_text())
    (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    out = tmp_path / "run"
    out.mkdir()
    if begun:
        (out / "config.json").touch()
    stand_in(tools, "mora-jax")
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(out), "SEEN": str(out), "TRAIN": "--config c.py"}
    subprocess.run([*container["command"], *container["args"]], env=env, check=True)
    assert calls(tools) == [f"mora-jax {expected.format(out=out)}"]
