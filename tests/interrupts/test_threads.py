"""Interrupts of functions: at the deadline, at a shutdown, and none after the end; reports of stuck jobs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import random
import threading
import time
from collections import Counter
from time import monotonic

import pytest
from dramatiq.middleware import Shutdown, TimeLimitExceeded

from dramatiq_policies.errors import TimeoutExceeded
from dramatiq_policies.interrupts import shutdown, slots
from dramatiq_policies.interrupts import threads as interrupts

from .helpers import (
    Watching,
    in_ms,
    near_the_deadline,
    run_on_threads,
    run_script,
    spin,
    spin_for_ever,
    wait_for,
)

# An interrupt may land in a callback of the garbage collector, which some library has set and can't raise: the job then
# goes on, as the interpreter says on stderr.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# --- the call -------------------------------------------------------------------------------------------------------


def test_a_job_that_ends_in_time_returns_its_result():
    assert interrupts.run(lambda a, *, b: (a, b), (1,), {"b": 2}, deadline=in_ms(60_000), on_shutdown=True) == (1, 2)


def test_without_limits_it_is_the_plain_call_and_no_thread_starts():
    before = threading.active_count()
    assert interrupts.run(threading.active_count, (), {}) == before


def test_a_job_that_runs_too_long_is_interrupted(delivery):
    with pytest.raises(TimeoutExceeded, match=r"mail ran for .* its timeout is 50 ms") as caught:
        interrupts.run(spin_for_ever, (), {}, deadline=in_ms(50))
    error = caught.value
    assert isinstance(error, TimeLimitExceeded)
    assert (error.actor, error.message_id, error.limit_ms) == ("mail", "id", 50)
    assert error.elapsed_ms >= 50


def test_a_deadline_that_has_passed_interrupts_at_once():
    with pytest.raises(TimeoutExceeded):
        interrupts.run(spin_for_ever, (), {}, deadline=monotonic() - 1)


def test_a_job_that_swallows_its_interrupt_has_succeeded():
    def job():
        try:
            spin_for_ever()
        except TimeoutExceeded:
            return "cleaned up"

    assert interrupts.run(job, (), {}, deadline=in_ms(10)) == "cleaned up"


def test_clean_up_runs_to_its_end_and_is_not_interrupted_again():
    cleaned = []

    def job():
        try:
            spin_for_ever()
        finally:
            spin(in_ms(100))
            cleaned.append(True)

    with pytest.raises(TimeoutExceeded):
        interrupts.run(job, (), {}, deadline=in_ms(10))
    assert cleaned


def test_a_job_s_own_error_comes_out_with_its_traceback_and_no_line_twice():
    def job():
        raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        interrupts.run(job, (), {}, deadline=in_ms(60_000))
    assert [entry.name for entry in caught.traceback][1:] == ["run", "job"]
    assert caught.value.__context__ is None


def test_an_error_leaves_no_reference_cycle_behind():
    class Marked(Exception):
        pass

    def job():
        raise Marked

    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            try:
                interrupts.run(job, (), {}, deadline=in_ms(60_000))
            except Marked:
                pass
        assert [o for o in gc.get_objects() if type(o) is Marked] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("swallowed", [False, True])
def test_connections_that_an_interrupt_may_have_hit_are_closed_before_the_thread_goes_on(swallowed):
    done = []

    def job():
        try:
            spin_for_ever()
        except TimeoutExceeded:
            done.append("interrupted")
            if not swallowed:
                raise

    with contextlib.nullcontext() if swallowed else pytest.raises(TimeoutExceeded):
        interrupts.run(job, (), {}, deadline=in_ms(10), after_interrupt=lambda: done.append("given up"))
    assert done == ["interrupted", "given up"]


def test_connections_are_kept_without_an_interrupt():
    given_up = []

    def fails():
        raise KeyError

    limits = {"deadline": in_ms(60_000), "on_shutdown": True, "after_interrupt": lambda: given_up.append(1)}
    interrupts.run(spin, (0,), {}, **limits)
    with pytest.raises(KeyError):
        interrupts.run(fails, (), {}, **limits)
    assert given_up == []


def test_connections_of_a_job_interrupted_near_its_deadline_are_closed_once_and_without_an_interrupt():
    dice = random.Random(3)
    ends = Counter()
    for _ in range(2_000):
        given_up = []

        def give_up(given_up=given_up):
            given_up.append("begun")
            spin(in_ms(0.2))
            given_up.append("done")

        deadline = monotonic() + 0.0002
        job = (deadline + dice.uniform(-0.0003, 0.0005), None, [])
        try:
            interrupts.run(near_the_deadline, job, {}, deadline=deadline, after_interrupt=give_up)
        except TimeoutExceeded:
            ends["timeout"] += 1
            assert given_up == ["begun", "done"]
        else:
            ends["result"] += 1
            assert given_up in ([], ["begun", "done"])
    assert min(ends["timeout"], ends["result"]) > 0, ends


def test_a_call_in_a_call_belongs_to_the_outer_one():
    def inner():
        spin_for_ever()

    def outer():
        interrupts.run(inner, (), {}, deadline=in_ms(60_000))

    with pytest.raises(TimeoutExceeded):
        interrupts.run(outer, (), {}, deadline=in_ms(20))


def test_an_interrupt_hidden_in_a_runtime_error_comes_out():
    def job():
        try:
            spin_for_ever()
        except TimeoutExceeded as error:
            raise RuntimeError("Timed out while waiting for coroutine.") from error

    with pytest.raises(TimeoutExceeded):
        interrupts.run(job, (), {}, deadline=in_ms(10))


def test_a_runtime_error_of_the_job_stays_one():
    def job():
        raise RuntimeError("mine") from KeyError()

    with pytest.raises(RuntimeError, match="mine"):
        interrupts.run(job, (), {}, deadline=in_ms(60_000))


def test_each_job_is_interrupted_at_its_own_deadline():
    """Whatever the order in which they are armed."""
    limits = [200, 20, 120, 40, 160, 80, 60, 140]

    def work(index):
        start = monotonic()
        with pytest.raises(TimeoutExceeded):
            interrupts.run(sleepy, (), {}, deadline=start + limits[index] / 1_000)
        return (monotonic() - start) * 1_000

    def sleepy():
        while True:
            time.sleep(0.001)

    for limit, elapsed in zip(limits, run_on_threads(len(limits), work), strict=True):
        assert limit <= elapsed < limit + 500


# --- the timer ------------------------------------------------------------------------------------------------------


def timer_threads():
    return [t for t in threading.enumerate() if t.name == "dramatiq-policies-timer"]


def test_a_single_timer_thread_serves_all_jobs():
    run_on_threads(8, lambda _: interrupts.run(time.sleep, (0.01,), {}, deadline=in_ms(60_000)))
    assert len(timer_threads()) == 1


def test_the_timer_sleeps_through_jobs_that_end_in_time(monkeypatch):
    looks = []
    fire_due = slots.Slot.fire_due
    monkeypatch.setattr(slots.Slot, "fire_due", lambda slot: looks.append(1) or fire_due(slot))
    for _ in range(100):
        interrupts.run(time.sleep, (0.001,), {}, deadline=in_ms(60_000))
    assert len(looks) < 10
    time.sleep(0.05)
    assert len(looks) < 10


def test_an_earlier_deadline_wakes_the_timer():
    interrupts.run(lambda: None, (), {}, deadline=in_ms(3_600_000))
    wait_for(lambda: interrupts._timer.wakes_at != float("inf"))
    start = monotonic()
    with pytest.raises(TimeoutExceeded):
        interrupts.run(spin_for_ever, (), {}, deadline=start + 0.02)
    assert monotonic() - start < 5


def test_the_timer_survives_an_error_of_its_own(monkeypatch, caplog):
    fire_due = slots.Slot.fire_due
    errors = [ValueError("once")]

    def failing(slot):
        if errors:
            raise errors.pop()
        return fire_due(slot)

    monkeypatch.setattr(slots.Slot, "fire_due", failing)
    with pytest.raises(TimeoutExceeded):
        interrupts.run(spin_for_ever, (), {}, deadline=in_ms(10))
    assert "The timer of the timeouts raised an error" in caplog.text


def test_a_forked_child_has_a_timer_of_its_own():
    run_script("""
        import os, time
        from dramatiq_policies.interrupts import threads as interrupts
        from dramatiq_policies.errors import TimeoutExceeded

        def spin():
            while True:
                pass

        def timed_out():
            try:
                interrupts.run(spin, (), {}, deadline=time.monotonic() + 0.05)
            except TimeoutExceeded:
                return True

        def job():
            # In the middle of a job, and of the timer's sleep.
            child = os.fork()
            if child == 0:
                time.sleep(0.3)
                return "child"
            assert os.waitpid(child, 0)[1] == 0
            return "parent"

        assert timed_out()
        if interrupts.run(job, (), {}, deadline=time.monotonic() + 60, on_shutdown=True) == "child":
            assert timed_out()
            os._exit(0)
        assert timed_out()
    """)


def test_a_child_is_not_interrupted_for_its_parent_s_deadline():
    run_script("""
        import os, time
        from dramatiq_policies.interrupts import threads as interrupts
        from dramatiq_policies.errors import TimeoutExceeded

        def job():
            child = os.fork()
            if child == 0:
                end = time.monotonic() + 0.5
                while time.monotonic() < end:
                    pass
                return "child"
            while True:
                pass

        try:
            outcome = interrupts.run(job, (), {}, deadline=time.monotonic() + 0.1)
        except TimeoutExceeded:
            outcome = "timeout"
            assert os.wait()[1] == 0
        else:
            assert outcome == "child"
            os._exit(0)
        assert outcome == "timeout"
    """)


def test_a_runtime_whose_threads_can_t_be_interrupted_logs_once_and_reports_stuck_jobs(monkeypatch, caplog):
    monkeypatch.setattr(slots, "_set_exception", None)
    slots._log_unsupported.cache_clear()
    interrupts.reset()
    for _ in range(3):
        watching = Watching(grace=0.01)
        assert interrupts.run(watching.told.wait, (10,), {}, deadline=in_ms(10), stuck_listener=watching, job="job")
        assert [job for job, _ in watching.seen] == ["job"]
    assert not slots.supported()
    assert [r.levelname for r in caplog.records if "can't interrupt" in r.message] == ["WARNING"]


# --- shutdown -------------------------------------------------------------------------------------------------------


def test_a_shutdown_interrupts_the_jobs_that_asked_for_it():
    started, over = threading.Barrier(4), threading.Event()

    def job():
        started.wait()
        while not over.is_set():
            pass
        return "ran to its end"

    def work(index):
        try:
            return interrupts.run(job, (), {}, deadline=in_ms(60_000) if index else None, on_shutdown=index < 2)
        except Shutdown:
            return "shutdown"

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(work, index) for index in range(3)]
        started.wait()
        shutdown()
        try:
            assert [future.result(20) for future in futures[:2]] == ["shutdown", "shutdown"]
        finally:
            over.set()
        assert futures[2].result() == "ran to its end"


def test_a_shutdown_interrupts_a_job_once():
    def job():
        times = 0
        end = in_ms(200)
        while monotonic() < end:
            try:
                shutdown()
                spin(end)
            except Shutdown:
                times += 1
        return times

    assert interrupts.run(job, (), {}, on_shutdown=True) == 1


def test_a_job_that_begins_after_the_shutdown_is_not_interrupted():
    shutdown()
    assert interrupts.run(lambda: spin(in_ms(20)) or "ran", (), {}, on_shutdown=True) == "ran"


def test_the_deadline_still_holds_for_a_job_that_swallowed_the_shutdown():
    def job():
        try:
            shutdown()
            spin_for_ever()
        except Shutdown:
            spin_for_ever()

    with pytest.raises(TimeoutExceeded):
        interrupts.run(job, (), {}, deadline=in_ms(50), on_shutdown=True)


# --- stuck jobs -----------------------------------------------------------------------------------------------------


@pytest.mark.untraced
def test_a_job_that_goes_on_is_reported_once_with_its_stack():
    watching = Watching()

    def in_a_c_call():
        time.sleep(0.5)

    with pytest.raises(TimeoutExceeded):
        interrupts.run(in_a_c_call, (), {}, deadline=in_ms(20), stuck_listener=watching, job="the job")
    ((job, stack),) = watching.seen
    assert job == "the job"
    assert "in in_a_c_call\n" in stack
    assert "time.sleep(0.5)" in stack


def test_a_job_that_ends_within_the_grace_is_not_reported():
    watching = Watching(grace=10)
    with pytest.raises(TimeoutExceeded):
        interrupts.run(spin_for_ever, (), {}, deadline=in_ms(10), stuck_listener=watching)
    wait_for(lambda: interrupts._timer.wakes_at != 0)
    assert watching.seen == []


def test_a_stuck_listener_that_fails_or_hangs_blocks_no_job(caplog):
    released = threading.Event()

    class Hanging(Watching):
        def stuck(self, job, stack):
            self.told.set()
            released.wait(10)
            raise ValueError("watch")

    watching = Hanging(grace=0.01)

    def job():
        try:
            spin_for_ever()
        except TimeoutExceeded:
            assert watching.told.wait(10)

    interrupts.run(job, (), {}, deadline=in_ms(10), stuck_listener=watching)
    with pytest.raises(TimeoutExceeded):
        interrupts.run(spin_for_ever, (), {}, deadline=in_ms(10))
    released.set()
    wait_for(lambda: "A stuck job could not be reported" in caplog.text)


def test_a_job_that_ends_while_its_stack_is_read_is_not_reported():
    slot, watching = slots.Slot(threading.get_ident()), Watching()
    slot.tokens = of_the_next_job = {}
    slot.report({}, watching, "the job")
    assert watching.seen == []
    slot.report(of_the_next_job, watching, "the next one")
    assert [job for job, _ in watching.seen] == ["the next one"]


def no_more_threads(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


def test_where_no_thread_can_be_started_a_stuck_job_is_reported_at_once(monkeypatch, caplog):
    no_more_threads(monkeypatch)
    told = []
    slots.report_on_thread(lambda: told.append("stuck"))
    assert told == ["stuck"]
    slots.report_on_thread(lambda: 1 / 0)
    assert "A stuck job could not be reported" in caplog.text


def test_where_no_thread_can_be_started_a_job_runs_and_logged_that_no_timeout_is_in_force(monkeypatch, caplog):
    interrupts.reset()
    with monkeypatch.context() as patch:
        no_more_threads(patch)
        assert interrupts.run(lambda: "result", (), {}, deadline=in_ms(10_000)) == "result"
    assert "no timeout is enforced" in caplog.text
    assert not interrupts.timer_runs()
    with pytest.raises(TimeoutExceeded):
        interrupts.run(spin_for_ever, (), {}, deadline=in_ms(10))


def test_a_job_does_not_end_before_the_thread_that_interrupts_it_is_done():
    slot = slots.Slot(threading.get_ident())
    interrupting = slot.lock
    interrupting.acquire()
    released = []

    def interrupt():
        time.sleep(0.05)
        released.append(True)
        interrupting.release()

    thread = threading.Thread(target=interrupt)
    thread.start()
    slot.disarm({})
    assert released
    thread.join()
