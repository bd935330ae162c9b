"""Signals: the first asks, a second SIGINT stops at once, also where the main thread can't hear it."""

import gc
import importlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mora_jax.training.distributed.signals import Stoppable, Stopped, StopSignals

# A call into C that lets other threads run and comes back only after minutes; no signal ends it.
DEAF = """
import hashlib, threading
from mora_jax.training.distributed.signals import Stoppable, StopSignals
with Stoppable(print) if "{kind}" == "Stoppable" else StopSignals(tell=print) as signals:
    threading.Timer(1, print, ["ready"]).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000_000)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_wish_and_a_second_interrupt_an_exception(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        signals.look()
        assert signals.received == number and signals.exit_code == 128 + number
        os.kill(os.getpid(), signal.SIGTERM)  # impatient supervisors repeat it
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1
    wait_for(lambda: not any(thread.name == "signals" for thread in threading.enumerate()))


@pytest.mark.parametrize(
    "kind, words",
    [
        ("StopSignals", "stopping after this step; again to stop without saving"),
        pytest.param("Stoppable", "stopping; again to stop at once", marks=pytest.mark.slow),
    ],
)
def test_a_deaf_process_says_what_will_be_and_ends_at_the_second_interrupt(kind, words):
    command = [sys.executable, "-u", "-c", DEAF.format(kind=kind)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == f"{words}\n"
        process.send_signal(signal.SIGTERM)  # a supervisor's is no second Ctrl-C
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "stopped at once\n"
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()


def test_what_is_said_follows_what_is_done():
    said = []
    with StopSignals(tell=said.append) as signals:
        signals.announce(("stopping this evaluation", "stop without saving"))
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: said)
    assert said == ["SIGTERM: stopping this evaluation"]


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
def test_the_first_signal_ends_a_command_and_leaves_its_cleaning_up_alone(number, error):
    cleaned = []

    def work():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            cleaned.append(True)

    with Stoppable(lambda words: None) as signals:
        with pytest.raises(error):
            work()
        assert signals.received == number
    assert cleaned == [True]


def test_nothing_is_raised_into_an_import(tmp_path, monkeypatch):
    (tmp_path / "imported_while_interrupted.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.3)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def work():
        importlib.import_module("imported_while_interrupted")
        time.sleep(10)

    with Stoppable(lambda words: None), pytest.raises(KeyboardInterrupt):
        work()
    assert sys.modules["imported_while_interrupted"].whole


def test_a_stop_that_hits_the_garbage_collector_is_not_lost():
    def hook(phase, info):
        gc.callbacks.remove(hook)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    def work():
        gc.collect()
        time.sleep(10)

    gc.callbacks.append(hook)
    with Stoppable(lambda words: None), pytest.raises(KeyboardInterrupt):
        work()


def test_signals_that_are_to_be_ignored_stay_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.look() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
