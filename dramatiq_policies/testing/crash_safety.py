"""`assert_crash_safe`: compare a job's effects after a crash at each of its lines."""

from __future__ import annotations

import copy
import linecache
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common.callables import unwrapped
from ..delivery.broker_state import state_of
from ..errors import ConfigurationError
from ..middleware.ordering import order_middleware
from ..transactions.outbox import outbox_on
from .draining import WorkerDied, drain, drain_in_progress
from .faults import die_in_job, redeliver
from .line_tracing import END, code_of, with_traced_lines
from .outboxes import AfterCommit, Unpublished, after_commits
from .patching import expect_actor, in_place_of
from .stub_environment import environment_of
from .stubbing import stub

if TYPE_CHECKING:
    from dramatiq import Actor
    from dramatiq.brokers.stub import StubBroker

    from ..delivery.delivery import Delivery
    from ..delivery.executor import Proceed
    from ..transactions.database import Connection
    from ..transactions.publisher import Ticket
    from ..transactions.scope import WrittenRows
    from .run import Run

__all__ = ["assert_crash_safe"]

# Moments without a line, in the place of a line's number, like `END`.
#: After a commit, before the outbox publishes the messages.
_COMMITTED = -1
#: After the commit of a transactional job, before the ack.
_DONE = -2


class Point(NamedTuple):
    """The place of a crash: before the ``visit``-th run of a line."""

    line: int
    visit: int


def assert_crash_safe(
    actor: Actor[..., Any],
    *args: Any,
    effects: Callable[[], Any],
    reset: Callable[[], object],
    **kwargs: Any,
) -> None:
    """Fail if a crash at a line of an actor, with the redelivery after it, changes the effects of the job::

        def test_a_crash_at_any_line_sends_no_second_mail():
            assert_crash_safe(send_confirmation, 42, "ada@example.com", effects=lambda: list(outbox), reset=outbox.clear)

    The job runs without a crash first. Then, for each line of the job, a worker dies just before the line (in a loop: at the
    first, second and last pass), and the broker delivers the message again. Two more runs: a crash after the last line, before
    the ack, and a message that is delivered twice. With an outbox, the worker also dies after each commit, before the messages of
    the commit are published, and after the commit of a transactional job, before the ack. Each run ends with empty queues, on a
    fresh StubBroker with an empty idempotency store.

    Parameters:
      args, kwargs: The arguments of the message.
      effects: Returns the effects of the job, such as the sent mails. Compared by ``==``: leave out times and message ids.
      reset: Undoes the effects. Called before each run.

    Raises:
      AssertionError: The effects differ (the text names the lines), or the job fails without a crash.

    Warns if ``effects()`` returns the same before and after the job.

    Limits: ``finally`` and ``except BaseException`` blocks run, unlike in a dead process. A call into C, or into another
    function of yours, counts as a single line.
    """
    __tracebackhide__ = True
    expect_actor("assert_crash_safe()", actor)
    for name, given in (("effects", effects), ("reset", reset)):
        if not callable(given):
            raise ConfigurationError.of_option("assert_crash_safe()", name, "a callable without arguments", given)
    scene = _Scene(actor, args, kwargs, effects, reset)
    expected = scene.undisturbed()
    unsafe = []
    for point in scene.points:
        got, _ = scene.play(die_at=point)
        if got != expected:
            unsafe.append(f"  when the worker dies {scene.describe(point)}\n    effects() is {got!r}")
    got, _ = scene.play(twice=True)
    if got != expected:
        unsafe.append(f"  when its message is delivered twice\n    effects() is {got!r}")
    if unsafe:
        found = "\n".join(unsafe)
        raise AssertionError(
            f"{actor.actor_name} is not crash-safe. Without a crash, effects() is {expected!r}. But\n{found}"
        )


class _Scene:
    """A job and its effects, for repeated runs."""

    def __init__(
        self,
        actor: Actor[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        effects: Callable[[], Any],
        reset: Callable[[], object],
    ) -> None:
        self.actor = actor
        self.args, self.kwargs = args, kwargs
        self.effects, self.reset = effects, reset
        self.code = code_of(unwrapped(actor.fn))
        self.visited: list[int] = []

    def undisturbed(self) -> Any:
        """Return the effects without a crash, and record the lines of the job."""
        __tracebackhide__ = True
        name = self.actor.actor_name
        self.reset()
        before = self._current_effects()
        # Once without tracing, for a coverage tool.
        expected, run = self.play(traced=False)
        if run.outcomes(self.actor)[-1:] != ["succeeded"]:
            raise AssertionError(f"{name} does not succeed even without a crash.\n{run!r}")
        if expected == before:
            warnings.warn(
                f"{name}: effects() is {before!r} both before and after the job: effects() does not see "
                "the job, so no crash can change it.",
                stacklevel=3,
            )
        again, _ = self.play()
        if again != expected:
            raise AssertionError(
                f"{name}: effects() is {expected!r} after one run without a crash and {again!r} after "
                "another. Let reset() undo every effect, and leave times and message ids out of "
                "effects()."
            )
        return expected

    @property
    def points(self) -> list[Point]:
        """Return the first, second and last pass of each line."""
        counts = Counter(self.visited)
        return [
            Point(line, visit)
            for line in dict.fromkeys(self.visited)
            for visit in sorted({1, min(2, counts[line]), counts[line]})
        ]

    def describe(self, point: Point) -> str:
        file = self.code.co_filename
        if point.line == END:
            return f"after the last line of the job, before the ack:\n    {file}"
        time = "" if point.visit == 1 else f" (time {point.visit})"
        if point.line == _COMMITTED:
            return f"after a commit, before its messages are published{time}:\n    {file}"
        if point.line == _DONE:
            return f"after the commit of the job's transaction, before the ack{time}:\n    {file}"
        source = linecache.getline(file, point.line).strip()
        return f"before line {point.line}{time}:\n    {file}:{point.line}: {source}"

    def play(self, *, die_at: Point | None = None, twice: bool = False, traced: bool = True) -> tuple[Any, Run]:
        self.reset()
        visits: Counter[int] = Counter()
        self.visited = visited = [] if die_at is None else self.visited

        def reach(line: int) -> None:
            if die_at is None:
                visited.append(line)
                return
            visits[line] += 1
            if (line, visits[line]) == die_at:
                die_in_job("assert_crash_safe()")

        def trace(fn: Any) -> Any:
            return with_traced_lines(fn, self.code, reach) if traced else fn

        with stub(self.actor.broker) as broker, in_place_of(self.actor, trace), _commits_as_points(broker, reach):
            order_middleware(broker).add_around_job(partial(_reach_after_commit, self.actor, reach), order=-1)
            message = self.actor.send(*self.args, **self.kwargs)
            if twice:
                redeliver(message, broker)
            run = drain(broker)
        return self._current_effects(), run

    def _current_effects(self) -> Any:
        seen = self.effects()
        try:
            return copy.deepcopy(seen)
        except Exception:
            return seen


@contextmanager
def _commits_as_points(broker: StubBroker, reach: Callable[[int], None]) -> Iterator[None]:
    """Call ``reach`` after each commit with messages of a drain. If it raises, a relay publishes the messages."""
    outbox = outbox_on(state_of(broker))
    if outbox is None:
        yield
        return

    def reaching(after_commit: AfterCommit) -> AfterCommit:
        def call(written: WrittenRows, connection: Connection | None) -> Ticket | None:
            if written.ids and drain_in_progress() is not None:
                try:
                    reach(_COMMITTED)
                except WorkerDied:
                    environment_of(broker).unpublished.append(Unpublished(outbox, written.take_all(), connection))
                    raise
            return after_commit(written, connection)

        return call

    with after_commits(outbox, reaching):
        yield


def _reach_after_commit(
    actor: Actor[..., Any], reach: Callable[[int], None], delivery: Delivery, proceed: Proceed
) -> Any:
    """Run a job, and call ``reach`` if the job is transactional and was committed."""
    result = proceed(delivery)
    transaction = delivery.transaction
    if transaction is not None and transaction.is_committed and delivery.message.actor_name == actor.actor_name:
        reach(_DONE)
    return result
