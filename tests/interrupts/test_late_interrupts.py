"""No interrupt is raised after the end of its job: at any instruction, and in races near the deadline."""

from __future__ import annotations

import ast
import asyncio
import inspect
import random
import sys
import threading
import time
import types
from collections import Counter
from time import monotonic

import pytest
from dramatiq.asyncio import async_to_sync
from dramatiq.middleware import Shutdown

from dramatiq_policies.errors import TimeoutExceeded
from dramatiq_policies.interrupts import coroutines, shutdown, slots
from dramatiq_policies.interrupts import threads as interrupts

from .helpers import (
    in_ms,
    near_the_deadline,
    run_on_threads,
    tail,
    wait_for,
)

# An interrupt may land in a callback of the garbage collector, which some library has set and can't raise: the job then
# goes on, as the interpreter says on stderr.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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


def near_the_deadline_at_a_call(until, result, seen):
    """Ends in C code, after which the interpreter looks for what is pending."""
    time.sleep(max(0.0, until - monotonic()))
    return result


@pytest.mark.untraced
@pytest.mark.parametrize("job", [near_the_deadline, near_the_deadline_at_a_call])
def test_jobs_that_end_near_their_deadline_have_one_outcome_and_leave_nothing(quick_switches, job):
    calls = 500
    found = run_on_threads(8, lambda _: hammer(interrupts.run, job, calls))
    ends = sum((ends for ends, _ in found), Counter())
    assert [leak for _, leaks in found for leak in leaks] == []
    assert ends.total() == 8 * calls
    assert set(ends) == {"result", "timeout"}


@pytest.mark.untraced
def test_jobs_that_end_near_a_shutdown_have_one_outcome_and_leave_nothing(quick_switches, shutdowns):
    calls = 500
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

    calls = 500
    found = run_on_threads(8, lambda _: hammer(coroutines.run, async_to_sync(job), calls, on_shutdown=True))
    ends = sum((ends for ends, _ in found), Counter())
    assert [leak for _, leaks in found for leak in leaks] == []
    assert ends.total() == 8 * calls
    assert set(ends) == {"result", "timeout", "shutdown"}


def test_an_interrupt_under_way_at_the_job_s_end_is_waited_for_and_dropped():
    # The timer has taken the token, and sets the exception only after the job has returned.
    def worker(_):
        slot = interrupts.slot_of_this_thread()
        under_way = threading.Event()

        def interrupt():
            with slot.lock:
                slot.tokens.pop(TimeoutExceeded)
                under_way.set()
                wait_for(lambda: slot.tokens is None)
                slots._set_exception(slot.thread_id, TimeoutExceeded)

        timer = threading.Thread(target=interrupt)

        def job():
            timer.start()
            assert under_way.wait(10)
            return "result"

        try:
            end = interrupts.run(job, (), {}, deadline=in_ms(600_000))
            timer.join()
            tail()
        except TimeoutExceeded:
            return "leaked"
        return end

    assert run_on_threads(1, worker) == ["result"]


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
