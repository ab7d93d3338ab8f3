from __future__ import annotations

import ast
import asyncio
import concurrent.futures
import contextlib
import contextvars
import gc
import inspect
import logging
import random
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections import Counter
from time import monotonic

import pytest
from dramatiq.asyncio import EventLoopThread, async_to_sync, set_event_loop_thread
from dramatiq.middleware import Shutdown, TimeLimitExceeded

from dramatiq_policies.delivery.current_job import current_job
from dramatiq_policies.delivery.delivery import RUNNING, Delivery, current
from dramatiq_policies.errors import TimeoutExceeded
from dramatiq_policies.interrupts import coroutines, runner_for, shutdown, slots
from dramatiq_policies.interrupts import threads as interrupts

# An interrupt may land in a callback of the garbage collector, which some library has set and can't raise: the job then
# goes on, as the interpreter says on stderr.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def no_callbacks_of_the_garbage_collector():
    callbacks, gc.callbacks[:] = gc.callbacks[:], []
    yield
    gc.callbacks[:] = callbacks


@pytest.fixture(autouse=True)
def fresh_timer():
    yield
    interrupts.reset()


@pytest.fixture
def event_loop():
    thread = EventLoopThread(logging.getLogger("loop"))
    thread.start(timeout=5)
    set_event_loop_thread(thread)
    yield thread
    thread.stop()
    thread.join()
    set_event_loop_thread(None)


class Watching:
    def __init__(self, grace=0.05):
        self.grace = grace
        self.seen = []
        self.told = threading.Event()

    def stuck(self, job, stack):
        self.seen.append((job, stack))
        self.told.set()


class FakeMessage:
    actor_name = "mail"
    queue_name = "default"
    message_id = "id"
    options: dict = {}  # noqa: RUF012


@pytest.fixture
def delivery():
    delivery = Delivery(None, FakeMessage())
    delivery.stage, delivery.started, delivery.timeout_ms = RUNNING, monotonic(), 50.0
    token = current.set(delivery)
    yield delivery
    current.reset(token)


def run_on_threads(number, work):
    """Run ``work(index)`` on threads of their own; what they return. What one raises is raised here."""
    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        return [future.result() for future in [pool.submit(work, index) for index in range(number)]]


def spin(until):
    while monotonic() < until:
        pass


def spin_for_ever():
    while True:
        pass


def in_ms(ms):
    return monotonic() + ms / 1_000


def wait_for(condition, seconds=10):
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "it did not happen"
        time.sleep(0.001)


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


def run_script(script):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


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
    started = threading.Barrier(3)

    def job(end):
        started.wait()
        spin(end)
        return "ran to its end"

    def work(index):
        try:
            return interrupts.run(
                job, (in_ms(500),), {}, deadline=in_ms(60_000) if index else None, on_shutdown=index < 2
            )
        except Shutdown:
            return "shutdown"

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(work, index) for index in range(3)]
        wait_for(lambda: sum(slot.tokens is not None for slot in interrupts._slots.values()) == 3)
        time.sleep(0.05)
        shutdown()
        assert [f.result() for f in futures] == ["shutdown", "shutdown", "ran to its end"]


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


# --- it never leaks -------------------------------------------------------------------------------------------------


def tail():
    """What comes after a call: pure Python, so that whatever is pending is raised in it."""
    for _ in range(100):
        pass


@pytest.fixture
def quick_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def shutdowns():
    """A thread that keeps calling `shutdown`."""
    done = threading.Event()

    def keep_on():
        while not done.wait(0.0003):
            shutdown()

    thread = threading.Thread(target=keep_on)
    thread.start()
    yield
    done.set()
    thread.join()


def hammer(call, job, calls, *, on_shutdown=False, tail=tail):
    """Jobs that end within a millisecond of their deadline; how they ended, and what was raised after a call."""
    dice = random.Random(calls)
    ends = Counter()
    leaks = []
    for number in range(calls):
        deadline = monotonic() + dice.uniform(0.0001, 0.0003)
        seen = []
        try:
            try:
                result = call(
                    job,
                    (deadline + dice.uniform(-0.0003, 0.0005), number, seen),
                    {},
                    deadline=deadline,
                    on_shutdown=on_shutdown,
                )
            except TimeoutExceeded:
                end = "timeout"
            except Shutdown:
                end = "shutdown"
            else:
                end = "result"
                assert result == number
                assert seen == []
            tail()
        except (TimeoutExceeded, Shutdown) as leak:
            leaks.append(leak)
        ends[end] += 1
    return ends, leaks


def near_the_deadline(until, result, seen):
    try:
        while monotonic() < until:
            pass
    except BaseException as error:
        seen.append(error)
        raise
    return result


def near_the_deadline_at_a_call(until, result, seen):
    """Ends in C code, after which the interpreter looks for what is pending."""
    time.sleep(max(0.0, until - monotonic()))
    return result


@pytest.mark.untraced
@pytest.mark.parametrize("job", [near_the_deadline, near_the_deadline_at_a_call])
def test_jobs_that_end_near_their_deadline_have_one_outcome_and_leave_nothing(quick_switches, job):
    calls = 2_000
    found = run_on_threads(8, lambda _: hammer(interrupts.run, job, calls))
    ends = sum((ends for ends, _ in found), Counter())
    assert [leak for _, leaks in found for leak in leaks] == []
    assert ends.total() == 8 * calls
    assert set(ends) == {"result", "timeout"}


@pytest.mark.untraced
def test_jobs_that_end_near_a_shutdown_have_one_outcome_and_leave_nothing(quick_switches, shutdowns):
    calls = 1_500
    found = run_on_threads(8, lambda _: hammer(interrupts.run, near_the_deadline, calls, on_shutdown=True))
    ends = sum((ends for ends, _ in found), Counter())
    assert [leak for _, leaks in found for leak in leaks] == []
    assert ends.total() == 8 * calls
    assert set(ends) == {"result", "timeout", "shutdown"}


@pytest.mark.untraced
def test_async_jobs_that_end_near_their_deadline_or_a_shutdown_have_one_outcome(quick_switches, shutdowns, event_loop):
    async def job(until, result, seen):
        try:
            while monotonic() < until:  # noqa: ASYNC110 - it ends near a moment, whatever else happens
                await asyncio.sleep(0)
        except BaseException as error:
            seen.append(error)
            raise
        return result

    calls = 1_500
    found = run_on_threads(8, lambda _: hammer(coroutines.run, async_to_sync(job), calls, on_shutdown=True))
    ends = sum((ends for ends, _ in found), Counter())
    assert [leak for _, leaks in found for leak in leaks] == []
    assert ends.total() == 8 * calls
    assert set(ends) == {"result", "timeout", "shutdown"}


OURS = {interrupts.run.__code__, slots.Slot.disarm.__code__}


class Saboteur:
    """Interrupts a call between two chosen instructions of our own code, as the timer and a shutdown might.

    `moments` says before which of its instructions, counted from the first after the job began; the first interrupt is
    the deadline's, the second a shutdown's. ``raised`` says that the last of them is raised right there. Otherwise it is
    set, and raised where the interpreter looks for it.
    """

    def __init__(self, moments, *, raised):
        self.moments = moments
        self.raised = raised
        self.count = -1
        self.used = []

    def __enter__(self):
        self.slot = interrupts.slot_of_this_thread()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc_info):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        if frame.f_code is job_of_the_saboteur.__code__:
            self.count = 0
            return None
        if frame.f_code not in OURS:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode" and self.count >= 0:
            self.count += 1
            if self.count - 1 in self.moments:
                self.strike(last=self.count - 1 == self.moments[-1])
        return self.trace

    def strike(self, *, last):
        interrupt = Shutdown if self.used else TimeoutExceeded
        # The timer takes the lock; nobody may hold it for longer than a moment, least of all this thread.
        assert self.slot.lock.acquire(timeout=1)
        try:
            tokens = self.slot.tokens
            if tokens is None or interrupt not in tokens:
                return
            self.used.append(interrupt)
            if self.raised and last:
                tokens.pop(interrupt)
                raise interrupt
            self.slot.interrupt(tokens, interrupt)
        finally:
            self.slot.lock.release()


def job_of_the_saboteur(error):
    if error is not None:
        raise error.with_traceback(None)
    return "result"


def sabotage(moments, *, raised, error=None):
    """How a sabotaged call ended, whether anything was used, and how many instructions could be chosen."""
    saboteur = Saboteur(moments, raised=raised)
    try:
        try:
            with saboteur:
                end = interrupts.run(job_of_the_saboteur, (error,), {}, deadline=in_ms(600_000), on_shutdown=True)
        except (TimeoutExceeded, Shutdown, KeyError) as raised_error:
            end = raised_error
        tail()
    except (TimeoutExceeded, Shutdown) as leak:
        pytest.fail(f"{leak!r} was raised after the call, interrupted at {moments}")
    slot = saboteur.slot
    assert slot.tokens is None
    assert not slot.lock.locked()
    return end, saboteur.used, saboteur.count


@pytest.mark.untraced
@pytest.mark.parametrize("raised", [False, True], ids=["set", "raised"])
@pytest.mark.parametrize("fails", [False, True], ids=["returned", "failed"])
def test_an_interrupt_between_any_two_instructions_after_the_job_s_end_is_dropped(raised, fails):
    # On a thread of its own: an exception that a tracer raises may stay behind as the one that is handled.
    run_on_threads(1, lambda _: interrupt_between_any_two_instructions(raised, fails))


def interrupt_between_any_two_instructions(raised, fails):
    error = KeyError("mine") if fails else None
    own = error or "result"
    # Each twice: from 3.12 on, a tracer's wish to see instructions may take effect the next time only.
    instructions = max(sabotage((), raised=raised, error=error)[2] for _ in range(2))
    assert instructions > 20
    interrupted = []
    for moment in range(instructions):
        for _ in range(2):
            end, used, _ = sabotage((moment,), raised=raised, error=error)
            if used:
                interrupted.append(end)
                break
            assert end == own
    # Before the job's end has been stored, it is as if the job's last instruction had been interrupted.
    stored = interrupted.index(own)
    assert stored < 10
    assert all(isinstance(end, TimeoutExceeded) for end in interrupted[:stored])
    assert all(end == own for end in interrupted[stored:])


class Instrument(ast.NodeTransformer):
    """Puts ``strike()`` before each statement of `run` and of `Slot.disarm`, and after the last of each block."""

    def __init__(self):
        self.inside = False

    def visit_FunctionDef(self, node):
        self.inside = node.name in ("run", "disarm")
        self.generic_visit(node)
        self.inside = False
        return node

    def generic_visit(self, node):
        super().generic_visit(node)
        if self.inside:
            for name in ("body", "orelse", "finalbody"):
                block = getattr(node, name, None)
                if isinstance(block, list) and block:
                    strike = ast.parse("strike()").body[0]
                    block[:] = [part for statement in block for part in (strike, statement)] + [strike]
        return node


@pytest.fixture(scope="module")
def instrumented():
    """`interrupts`, over `slots`, with a hook between any two statements that may raise."""
    copies = []
    for original in (slots, interrupts):
        tree = Instrument().visit(ast.parse(inspect.getsource(original)))
        copy = types.ModuleType(f"{original.__name__}_instrumented")
        copy.__dict__.update(__package__="dramatiq_policies.interrupts", strike=lambda: None)
        exec(compile(ast.fix_missing_locations(tree), original.__file__, "exec"), copy.__dict__)
        copies.append(copy)
    copy_of_slots, copy = copies
    copy.Slot = copy_of_slots.Slot
    copy_of_slots.strike = lambda: copy.strike()  # noqa: PLW0108 - that of the moment
    yield copy
    copy.reset()


@pytest.mark.parametrize("fails", [False, True], ids=["returned", "failed"])
def test_two_interrupts_between_any_statements_after_the_job_s_end_are_dropped(instrumented, fails):
    own = KeyError("mine") if fails else "result"
    slot = instrumented.slot_of_this_thread()
    both = dropped = 0

    def attempt(moments):
        """How a call ended that was interrupted at two of its statements, and what interrupted it."""
        used = []
        count = -1
        ended = False

        def job():
            nonlocal ended
            ended = True
            if fails:
                raise own.with_traceback(None)
            return own

        def strike():
            nonlocal count
            if not ended:
                return
            count += 1
            if count not in moments:
                return
            with slot.lock:
                interrupt = Shutdown if used else TimeoutExceeded
                if slot.tokens is None or slot.tokens.pop(interrupt, None) is None:
                    return
            used.append(interrupt)
            raise interrupt

        instrumented.strike = strike
        try:
            end = instrumented.run(job, (), {}, deadline=in_ms(600_000), on_shutdown=True)
        except (TimeoutExceeded, Shutdown, KeyError) as error:
            end = error
        finally:
            instrumented.strike = lambda: None
        tail()
        assert slot.tokens is None
        assert not slot.lock.locked()
        return end, used, count + 1

    for first in range(attempt(())[2]):
        stored = attempt((first,))[0] == own
        for second in range(first + 1, first + 40):
            end, used, _ = attempt((first, second))
            both += len(used) == 2
            dropped += end == own and len(used) == 2
            assert end == own or (not stored and isinstance(end, (TimeoutExceeded, Shutdown)))
    assert both > 5
    assert dropped > 0


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


# --- async ----------------------------------------------------------------------------------------------------------


def call_async(fn, *args, **limits):
    return coroutines.run(async_to_sync(fn), args, {}, **limits)


def call_until_begun(fn, **limits):
    """Call ``fn`` with a short deadline. On a busy machine the deadline may come before ``fn`` begins: try a longer one."""
    for milliseconds in (10, 100, 1_000, 10_000):
        begun = []

        async def begin(begun=begun):
            begun.append(True)
            return await fn()

        try:
            return call_async(begin, deadline=in_ms(milliseconds), **limits)
        except TimeoutExceeded:
            if begun:
                raise
    raise AssertionError(f"{fn} did not begin")


async def sleep_for_ever():
    await asyncio.sleep(3_600)


def test_dramatiq_s_wrapper_of_a_coroutine_function_is_known():
    assert coroutines.is_async(async_to_sync(sleep_for_ever))
    assert not coroutines.is_async(sleep_for_ever)
    assert not coroutines.is_async(spin)
    assert runner_for(async_to_sync(sleep_for_ever)) is coroutines.run
    assert runner_for(spin) is interrupts.run


def test_an_async_job_returns_its_result(event_loop):
    async def job(a, b):
        await asyncio.sleep(0)
        return a + b

    assert call_async(job, 1, 2) == 3
    assert call_async(job, 1, 2, deadline=in_ms(60_000)) == 3


def test_an_async_job_is_cancelled_where_it_awaits_and_its_connections_are_kept(event_loop):
    given_up = []
    with pytest.raises(TimeoutExceeded):
        call_until_begun(sleep_for_ever, after_interrupt=lambda: given_up.append(1))
    assert given_up == []


def test_without_an_event_loop_the_error_is_dramatiq_s():
    with pytest.raises(RuntimeError, match="Have you added the AsyncIO middleware"):
        call_async(sleep_for_ever, deadline=in_ms(60_000))


def test_an_async_job_is_cancelled_at_its_deadline_and_cleans_up(event_loop, delivery):
    cleaned = []

    async def job():
        try:
            await asyncio.sleep(3_600)
        finally:
            await asyncio.sleep(0.05)
            cleaned.append(threading.current_thread())

    with pytest.raises(TimeoutExceeded) as caught:
        call_until_begun(job)
    assert cleaned == [event_loop]
    assert caught.value.actor == "mail"
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)


def test_clean_up_that_takes_long_is_still_a_timeout(event_loop):
    async def job():
        try:
            await asyncio.sleep(3_600)
        finally:
            await asyncio.sleep(1.2)  # Dramatiq waits for one second.

    with pytest.raises(TimeoutExceeded):
        call_until_begun(job)


def test_a_coroutine_that_swallows_its_cancellation_has_succeeded(event_loop):
    async def job():
        try:
            await asyncio.sleep(3_600)
        except asyncio.CancelledError:
            return "cleaned up"

    assert call_until_begun(job) == "cleaned up"


def test_an_error_of_the_clean_up_is_the_job_s_error(event_loop):
    async def job():
        try:
            await asyncio.sleep(3_600)
        finally:
            raise KeyError("clean-up")

    with pytest.raises(KeyError):
        call_until_begun(job)


def test_errors_of_the_job_s_own_are_not_taken_for_ours(event_loop):
    async def times_out():
        await asyncio.wait_for(asyncio.sleep(10), 0.001)

    async def is_cancelled():
        asyncio.current_task().cancel()
        await asyncio.sleep(10)

    async def exits():
        raise SystemExit(3)

    with pytest.raises(asyncio.TimeoutError):
        call_async(times_out, deadline=in_ms(60_000))
    with pytest.raises(concurrent.futures.CancelledError):
        call_async(is_cancelled, deadline=in_ms(60_000))
    with pytest.raises(SystemExit):
        call_async(exits, deadline=in_ms(60_000))
    assert event_loop.loop.is_running()


def test_an_async_job_is_notified_of_a_shutdown(event_loop):
    threading.Timer(0.05, shutdown).start()
    with pytest.raises(Shutdown):
        call_async(sleep_for_ever, on_shutdown=True)


def test_a_coroutine_that_is_interrupted_before_it_began_does_not_begin(event_loop):
    begun = []

    async def job():
        begun.append(True)

    blocked = threading.Event()
    event_loop.loop.call_soon_threadsafe(blocked.wait, 10)
    threading.Timer(0.1, blocked.set).start()
    with pytest.raises(TimeoutExceeded):
        call_async(job, deadline=in_ms(10))
    assert begun == []


def test_context_variables_reach_the_coroutine(event_loop, delivery):
    variable = contextvars.ContextVar("variable")
    variable.set("mine")

    async def job():
        return variable.get(), current_job().message_id

    assert call_async(job, deadline=in_ms(60_000)) == ("mine", "id")


def test_a_stuck_coroutine_is_reported_with_its_own_stack(event_loop):
    watching = Watching()

    async def waits_on():
        try:
            await asyncio.sleep(3_600)
        except asyncio.CancelledError:
            await cleans_up()

    async def cleans_up():
        while not watching.told.is_set():  # noqa: ASYNC110 - that comes from another thread
            await asyncio.sleep(0.01)

    call_until_begun(waits_on, stuck_listener=watching, job="job")
    ((job, stack),) = watching.seen
    assert job == "job"
    assert "in waits_on\n" in stack
    assert "in cleans_up\n" in stack


def test_a_coroutine_that_blocks_the_loop_is_reported_with_the_loop_s_stack(event_loop):
    watching = Watching()

    async def blocks():
        watching.told.wait(10)

    call_until_begun(blocks, stuck_listener=watching)
    ((_, stack),) = watching.seen
    assert "in run_forever\n" in stack
    assert "in blocks\n" in stack


@types.coroutine
def never():
    yield


def test_a_coroutine_that_is_thrown_away_with_its_loop_ends_with_an_error():
    async def job():
        await never()

    run = coroutines._Run(None, job())
    on_the_loop = run._main()
    on_the_loop.send(None)
    on_the_loop.close()
    with pytest.raises(RuntimeError, match="Event loop is not running"):
        run.wait()


def test_an_interrupt_that_finds_the_loop_closed_is_dropped():
    loop = asyncio.new_event_loop()
    loop.close()
    coroutine = sleep_for_ever()
    coroutines._Run(types.SimpleNamespace(loop=loop), coroutine).interrupt(TimeoutExceeded)
    coroutine.close()


# --- gevent ---------------------------------------------------------------------------------------------------------

GEVENT = """
    from gevent import monkey; monkey.patch_all()
    import random, threading, time
    import gevent
    from dramatiq.middleware import Shutdown
    from dramatiq_policies.interrupts import runner_for, shutdown
    from dramatiq_policies.interrupts import threads as interrupts
    from dramatiq_policies.delivery.delivery import RUNNING, Delivery, current
    from dramatiq_policies.errors import TimeoutExceeded

    def job(seconds=10):
        time.sleep(seconds)
        return "result"

    call = runner_for(job)
    assert call is not interrupts.run
"""


def test_under_gevent_a_job_is_interrupted_by_the_hub():
    pytest.importorskip("gevent")
    run_script(
        textwrap.dedent(GEVENT)
        + textwrap.dedent("""
        class Message:
            actor_name, message_id = "mail", "id"

        delivery = Delivery(None, Message())
        delivery.stage, delivery.started, delivery.timeout_ms = RUNNING, time.monotonic(), 50.0
        current.set(delivery)
        start = time.monotonic()
        try:
            call(job, (), {}, deadline=start + 0.05)
        except TimeoutExceeded as error:
            assert error.actor == "mail" and error.elapsed_ms >= 50, vars(error)
        else:
            raise AssertionError
        assert time.monotonic() - start < 5
        assert call(job, (0.01,), {}, deadline=time.monotonic() + 1) == "result"

        class Watch:
            grace = 0.05
            seen = []
            def stuck(self, job, stack):
                self.seen.append((job, stack))

        def swallows():
            try:
                time.sleep(10)
            except TimeoutExceeded:
                time.sleep(0.3)
                return "swallowed"

        assert call(swallows, (), {}, deadline=time.monotonic() + 0.05, stuck_listener=Watch(), job=1) == "swallowed"
        ((job_, stack),) = Watch.seen
        assert job_ == 1 and "in swallows" in stack, stack

        given_up = []
        limits = dict(on_shutdown=True, after_interrupt=lambda: given_up.append(1))
        call(job, (0,), {}, **limits)
        assert given_up == []
        gevent.spawn_later(0.05, shutdown)
        try:
            call(job, (), {}, **limits)
        except Shutdown:
            assert given_up == [1]
        else:
            raise AssertionError
        """)
    )


def test_under_gevent_a_call_without_limits_or_in_a_call_is_the_plain_one():
    pytest.importorskip("gevent")
    run_script(
        textwrap.dedent(GEVENT)
        + textwrap.dedent("""
        assert call(job, (0.01,), {}) == "result"

        def in_a_call():
            return call(job, (0.05,), {}, deadline=time.monotonic() + 0.01)

        assert call(in_a_call, (), {}, deadline=time.monotonic() + 10) == "result"
        """)
    )


def test_under_gevent_an_interrupt_hidden_in_a_runtime_error_comes_out_and_any_other_stays_one():
    pytest.importorskip("gevent")
    run_script(
        textwrap.dedent(GEVENT)
        + textwrap.dedent("""
        def hides():
            try:
                job()
            except TimeoutExceeded as interrupt:
                raise RuntimeError("clean-up took too long") from interrupt

        def fails():
            raise RuntimeError("of the job's own")

        for one, error in ((hides, TimeoutExceeded), (fails, RuntimeError)):
            try:
                call(one, (), {}, deadline=time.monotonic() + 0.05)
            except BaseException as raised:
                assert type(raised) is error, raised
            else:
                raise AssertionError
        """)
    )


def test_under_gevent_the_hub_interrupts_no_job_that_has_just_ended():
    pytest.importorskip("gevent")
    run_script(
        textwrap.dedent(GEVENT)
        + textwrap.dedent("""
        from dramatiq_policies.interrupts import greenlets

        class Watch:
            grace = 0.0
            def stuck(self, job, stack):
                raise SystemExit("told")

        run = greenlets._Run(time.monotonic() + 10, True, Watch(), "job")
        run.end()
        run._expire()
        run._report()
        run._throw(TimeoutExceeded)
        time.sleep(0.05)
        """)
    )


def test_under_gevent_nothing_is_raised_after_the_call():
    pytest.importorskip("gevent")
    run_script(
        textwrap.dedent(GEVENT)
        + textwrap.dedent("""
        ends, leaks = [], []

        def work(seed):
            dice = random.Random(seed)
            for _ in range(500):
                try:
                    try:
                        seconds = dice.uniform(0, 0.003)
                        deadline = time.monotonic() + 0.0015
                        ends.append(call(job, (seconds,), {}, deadline=deadline, on_shutdown=seed % 2 == 0))
                    except TimeoutExceeded:
                        ends.append("timeout")
                    except Shutdown:
                        ends.append("shutdown")
                    time.sleep(0)
                    time.sleep(0.0005)
                except BaseException as leak:
                    leaks.append(leak)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(20)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            shutdown()
            time.sleep(0.002)
        assert leaks == [], leaks
        assert len(ends) == 10_000
        assert set(ends) == {"result", "timeout", "shutdown"}, set(ends)
        """)
    )


def test_under_gevent_an_async_job_is_cancelled():
    pytest.importorskip("gevent")
    run_script(
        textwrap.dedent(GEVENT)
        + textwrap.dedent("""
        import asyncio, logging
        from dramatiq.asyncio import EventLoopThread, async_to_sync, set_event_loop_thread

        thread = EventLoopThread(logging.getLogger("loop"))
        thread.start(timeout=5)
        set_event_loop_thread(thread)

        async def coroutine(seconds):
            await asyncio.sleep(seconds)
            return "result"

        fn = async_to_sync(coroutine)
        call = runner_for(fn)
        assert call(fn, (0.01,), {}, deadline=time.monotonic() + 5) == "result"
        start = time.monotonic()
        try:
            call(fn, (10,), {}, deadline=start + 0.05)
        except TimeoutExceeded:
            pass
        else:
            raise AssertionError
        assert time.monotonic() - start < 5
        thread.stop()
        """)
    )
