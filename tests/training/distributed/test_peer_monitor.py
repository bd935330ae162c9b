"""The watch alone, in small processes without JAX: whoever ends, ends all, and says why."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mora_jax.training.distributed.peer_monitor as watch_module

# Process 0 prints what the others need; each says "ready", and then does what it reads.
PROGRAM = """
import importlib.util, json, sys, time
spec = importlib.util.spec_from_file_location("watch", sys.argv[1])
watch_module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(watch_module)
index, count = int(sys.argv[2]), int(sys.argv[3])
watch = watch_module.Watch(index, count)
watch.resume = "mora-jax train --resume runs/a"
if index == 0:
    print(json.dumps(watch.listen(["localhost"])), flush=True)
    while len(watch._peers) < count - 1:
        time.sleep(0.01)
else:
    assert watch.connect(json.loads(sys.argv[4]))
print("ready", flush=True)
match sys.stdin.readline().split():
    case ["fail", code]:
        watch.fail("failed: no such file", int(code))
    case ["lost"]:
        watch.lost("Connection reset by peer")
    case ["end"]:
        watch.close()
"""


@pytest.fixture
def three():
    """Three processes that watch over each other."""
    processes: list[subprocess.Popen] = []

    def start(index: int, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-I", "-c", PROGRAM, str(Path(watch_module.__file__)), str(index), "3", *more]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return processes[-1]

    found = json.loads(start(0).stdout.readline())
    for index in (1, 2):
        start(index, json.dumps(found))
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def say(process: subprocess.Popen, words: str) -> None:
    process.stdin.write(words + "\n")
    process.stdin.flush()


def end_of(process: subprocess.Popen) -> tuple[int, str]:
    process.wait(timeout=60)
    return process.returncode, process.stderr.read().strip()


AGAIN = "; start all processes again with mora-jax train --resume runs/a"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(three, victim):
    three[victim].kill()
    for index in {0, 1, 2} - {victim}:
        words = f"error: process {victim} of 3 is gone, so process {index} stops too{AGAIN}"
        assert end_of(three[index]) == (75, words)


@pytest.mark.parametrize(("code", "expected", "advice"), [(2, 2, ""), (1, 75, AGAIN)])
def test_a_process_that_fails_tells_the_others_why(three, code, expected, advice):
    say(three[2], f"fail {code}")
    assert end_of(three[2]) == (code, "")
    for index in (0, 1):
        words = f"error: process 2 of 3 failed: no such file, so process {index} stops too{advice}"
        assert end_of(three[index]) == (expected, words)


def test_processes_that_are_done_may_go(three):
    for process in reversed(three):
        say(process, "end")
    assert [end_of(process) for process in three] == [(0, "")] * 3


def test_a_failed_collective_is_a_sign(three):
    say(three[1], "lost")
    code, words = end_of(three[1])
    assert code == 75
    assert words == f"error: another process of 3 is gone (Connection reset by peer), so process 1 stops too{AGAIN}"
    assert end_of(three[0])[0] == end_of(three[2])[0] == 75
