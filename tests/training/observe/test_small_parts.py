"""The clock, the range of a trace, the names of plots, and the reasons for a second compilation."""

import threading
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from mora_jax.cli.train import profile_keys
from mora_jax.errors import InputError
from mora_jax.training.config.schema import LogConfig
from mora_jax.training.observe import observer
from mora_jax.training.observe.compile_log import CompileLog
from mora_jax.training.observe.observer import StepClock
from mora_jax.training.observe.profile import profiled
from mora_jax.training.observe.writers import Background, tagged
from mora_jax.training.sharding.runner import Runner


def test_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(observer.time, "perf_counter", lambda: now[0])
    clock = StepClock()
    now[0] = 101.0
    clock.waited_for_data(since=100.5)
    now[0] = 111.0
    clock.exclude(9.0)
    now[0] = 114.0
    clock.waited_for_device(since=112.0)
    times = clock.lap()
    assert times == (5.0, 0.5, 2.5, 2.0)
    now[0] = 200.0
    clock.restart()
    now[0] = 201.0
    assert clock.lap() == (1.0, 0.0, 1.0, 0.0)
    assert clock.total == (6.0, 0.5, 3.5, 2.0)
    clock.restart()
    now[0] = 210.0  # held up by others until the step is sent
    clock.first_sent()
    now[0] = 211.0
    clock.first_sent()  # the second, before the first is known to be done
    now[0] = 212.0
    assert clock.lap(211.5).step == 1.5
    now[0] = 213.0
    clock.first_sent()
    assert clock.lap().step == 1.5


@pytest.mark.parametrize(
    ("log", "first_step", "expected"),
    [
        (LogConfig(), 0, range(0)),
        (LogConfig(profile_steps=3), 0, range(3, 6)),
        (LogConfig(profile_steps=3), 10, range(13, 16)),
        (LogConfig(profile_steps=3), 18, range(19, 21)),
        (LogConfig(profile_steps=30), 0, range(1, 21)),
        (LogConfig(profile_steps=2, profile_first=7), 0, range(7, 9)),
        (LogConfig(profile_steps=4, profile_first=7), 8, range(9, 11)),
        (LogConfig(profile_steps=2, profile_first=20), 0, range(20, 21)),
    ],
)
def test_the_steps_of_a_trace(log, first_step, expected):
    assert profiled(log, first_step, steps=20) == expected


def test_steps_that_are_over_are_not_traced():
    assert not profiled(LogConfig(profile_steps=2, profile_first=3), 8, steps=20)


def test_the_option():
    assert profile_keys(None) == {}
    assert profile_keys("") == {"log.profile_steps": 3}
    assert profile_keys("10:12") == {"log.profile_first": 10, "log.profile_steps": 3}
    for text in ("0:2", "5:4", "5", "a:b", "1:2:3", "-1:2"):
        with pytest.raises(InputError, match="--profile must be FIRST:LAST"):
            profile_keys(text)


def test_names_are_grouped_and_what_is_unknown_is_left_out():
    row = {"step": 3, "loss": 1, "mfu": None, "step_seconds": 0.5, "device_bytes": 7, "eval_loss": 2.0}
    assert tagged(row) == {
        "train/loss": 1.0,
        "speed/step_seconds": 0.5,
        "memory/device_bytes": 7.0,
        "eval/loss": 2.0,
    }


class Slow:
    """A writer that takes its time, and breaks at one step."""

    name, how_to_open = "slow", ""

    def __init__(self, breaks_at=None):
        self.breaks_at, self.seen, self.free = breaks_at, [], threading.Event()

    def write(self, row):
        self.free.wait(60)
        if row["step"] == self.breaks_at:
            raise OSError("no space left")
        self.seen.append(row["step"])

    def close(self, summary):
        self.seen.append(summary)


def test_nobody_waits_for_a_writer_and_nothing_is_lost():
    writer = Slow()
    background = Background([writer])
    row = {"step": 1}
    for row["step"] in (1, 2, 3):
        background.write(row)  # the same dictionary: what was handed over stays as it was
    assert writer.seen == []
    writer.free.set()
    background.close({"end": 1})
    assert writer.seen == [1, 2, 3, {"end": 1}]


def test_an_error_of_a_writer_reaches_the_run():
    writer, other = Slow(breaks_at=1), Slow()
    background = Background([writer, other])
    background.write({"step": 1})
    background.write({"step": 2})
    writer.free.set()
    other.free.set()
    with pytest.raises(OSError, match="no space left"):
        background.close(None)
    assert writer.seen == other.seen == [2, None]


class Doubling(Runner):
    """The smallest runner."""

    devices: ClassVar[list] = jax.devices()[:1]

    def lower(self, state, frozen, batch):
        return jax.jit(lambda state, frozen, batch: (state, 2 * batch["input_ids"])).lower(state, frozen, batch)


def test_a_second_compilation_names_what_changed():
    runner, written = Doubling(), []
    with CompileLog(written.extend) as log:
        batches = [{"input_ids": jnp.ones((2, 8))}, {"input_ids": jnp.ones((2, 4), jnp.int32), "y": jnp.ones(3)}]
        assert not log.take(runner.compilation_log)  # making the arrays compiled nothing of the step's
        for batch in (*batches, batches[0]):
            runner({}, {}, batch)
        assert [one.shapes for one in log.take(runner.compilation_log)] == [
            {"input_ids": "float32[2,8]"},
            {"input_ids": "int32[2,4]", "y": "float32[3]"},
        ]
        assert not log.take(runner.compilation_log)
    steps = [row for row in written if row["what"] == "training step"]
    assert [row["changed"] for row in steps] == [
        [],
        ["input_ids: float32[2,8] -> int32[2,4]", "y: absent -> float32[3]"],
    ]
    assert runner.compilations == 2


def test_other_programs_are_heard_of_while_the_log_is_open():
    written = []
    with CompileLog(written.extend) as log:
        jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(5)).block_until_ready()
        log.take(())
        heard = log.other_seconds
    assert heard > 0
    jax.jit(lambda x: jnp.cos(x) * 3)(jnp.ones(5)).block_until_ready()
    log.take(())
    assert log.other_seconds == heard
