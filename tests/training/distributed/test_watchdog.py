"""The watchdog: a step that takes too long is reported once, with what every thread is doing."""

import threading

from mora_jax.training.hooks import Watchdog


class Clock:
    """Time that stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_step_that_takes_too_long_is_reported_once():
    clock, reports = Clock(), []
    watchdog = Watchdog(60, reports.append, clock)

    def after(seconds):
        clock.now += seconds
        watchdog.look()
        return len(reports)

    assert after(1000) == 0  # nothing has begun
    watchdog.on_begin(7)
    assert after(59) == 0
    with watchdog.compiling():
        assert after(1000) == 0
    assert after(59) == 0  # the time begins anew after a pause
    assert after(2) == 1 and after(500) == 1
    assert reports[0].startswith("step 7 has not ended after 61 s (train.watchdog_seconds=60)")
    watchdog.on_begin(8)
    assert after(59) == 1
    watchdog.on_begin(9)
    assert after(61) == 2
    watchdog.on_begin(None)
    assert after(1000) == 2


def test_the_stacks_name_the_function_that_hangs():
    release, reported, reports = threading.Event(), threading.Event(), []

    def a_function_that_hangs():
        release.wait(30)

    def report(text):
        reports.append(text)
        reported.set()

    thread = threading.Thread(target=a_function_that_hangs)
    thread.start()
    with Watchdog(0.05, report) as watchdog:
        watchdog.on_begin(3)
        assert reported.wait(30)
    release.set()
    thread.join()
    assert len(reports) == 1 and "a_function_that_hangs" in reports[0] and "test_watchdog.py" in reports[0]
    assert threading.active_count() >= 1 and not any(t.name == "watchdog" for t in threading.enumerate())
