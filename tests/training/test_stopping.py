"""Signals: the first asks, a second SIGINT stops at once, also where the main thread can't hear it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mora_jax.training.stopping import StopSignals

# A call into C that lets other threads run and comes back only after minutes; no signal ends it.
DEAF = """
import hashlib
from mora_jax.training.stopping import StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
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
    deadline = time.monotonic() + 10
    while any(thread.name == "second interrupt" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_interrupt_ends_a_process_whose_main_thread_is_deaf():
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.stdout.close()
