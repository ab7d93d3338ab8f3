"""Dramatiq's composition middleware, except that what they enqueue is part of the hand-off, and its results.

Stock enqueues the next stage, a group's callbacks, and the messages of ``on_success`` and ``on_failure`` in an after-hook,
whose errors are swallowed: the message is acked and the stage is lost. So is a result, which a duplicate of a completed
job may need.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.middleware import Callbacks as StockCallbacks
from dramatiq.middleware import GroupCallbacks as StockGroupCallbacks
from dramatiq.middleware import Middleware
from dramatiq.middleware import Pipelines as StockPipelines
from dramatiq.rate_limits import Barrier
from dramatiq.rate_limits.backends import StubBackend
from dramatiq.results import Results as StockResults

from ..common import clock
from ..delivery.callbacks import callback_of, send_to
from ..delivery.delivery import Delivery, OutgoingMessage, Recorder
from ..interrupts import unwrap_interrupt
from ..outcomes import Outcome, text_of

if TYPE_CHECKING:
    from dramatiq.broker import Broker, MessageProxy

__all__ = ["Callbacks", "GroupCallbacks", "Pipelines", "storing"]

#: Seconds between the tries to store a result.
_PAUSES = (0.05, 0.2, 0.75, 1.5, 2.5)


def _hand_on(
    stock: type[Middleware], middleware: Middleware, broker: Broker, message: MessageProxy, result: Any
) -> None:
    """Have the stock middleware's own code run as a step of the hand-off, and record what it enqueues."""
    delivery: Delivery | None = getattr(message, "delivery", None)
    if delivery is None:
        stock.after_process_message(middleware, broker, message, result=result)
        return

    def step() -> list[OutgoingMessage]:
        recorder = Recorder(broker)
        stock.after_process_message(middleware, recorder, message, result=result)  # type: ignore[arg-type]
        return recorder.sends

    delivery.add_to_outbox(step)


class Pipelines(StockPipelines):
    """Moves pipelines on; the stage's message is acked once the broker has accepted the next one."""

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        if exception is None and not message.failed and message.options.get("pipe_target") is not None:
            _hand_on(StockPipelines, self, broker, message, result)


class Callbacks(StockCallbacks):
    """Sends the messages of ``on_success`` and ``on_failure``; the job's message is acked once the broker has accepted them.

    ``on_failure`` is told of each failed run, as in Dramatiq, and not of a job that snoozed or that a shutdown interrupted.
    """

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is None:
            StockCallbacks.after_process_message(self, broker, message, result=result, exception=exception)
            return
        option = "on_success" if exception is None else "on_failure"
        target = callback_of(broker, message, option)
        if not target:
            return
        if exception is None:
            delivery.add_to_outbox(lambda: send_to(broker, delivery, message, option, target, result))
            return
        error = unwrap_interrupt(exception)
        told = {"type": type(error).__name__, "message": text_of(error)}

        def tell_failure() -> list[OutgoingMessage]:
            decision = delivery.decision
            if decision is not None and decision.outcome in _NO_FAILURES:
                return []
            return send_to(broker, delivery, message, option, target, told)

        delivery.add_to_outbox(tell_failure)


#: The outcomes of a run that raised and did not fail.
_NO_FAILURES = frozenset({Outcome.DEFERRED, Outcome.INTERRUPTED})


class GroupCallbacks(StockGroupCallbacks):
    """Counts a group's members; a member's message is acked once the callbacks it completes were accepted.

    Where the barriers are on Redis or in memory a member counts once, by its message id, however often it is settled.
    Elsewhere (Memcached) a barrier is a bare counter: a member that is redelivered after it was counted counts twice.
    """

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        options = message.options
        if exception is not None or message.failed or not options.get("group_completion_callbacks"):
            return
        delivery: Delivery | None = getattr(message, "delivery", None)
        count = self._counter()
        if delivery is None or count is None:
            _hand_on(StockGroupCallbacks, self, broker, message, result)
            return

        def step() -> list[OutgoingMessage]:
            if not count(options["group_completion_uuid"], message.message_id):
                return []
            return [OutgoingMessage(Message(**callback)) for callback in options["group_completion_callbacks"]]

        delivery.add_to_outbox(step)

    def _counter(self) -> Callable[[str, str], bool] | None:
        """Counts a member at a group's barrier and says whether it completes the group; None where it can't be once."""
        backend: Any = self.rate_limiter_backend
        if isinstance(backend, StubBackend):
            return lambda uuid, member: (
                backend.add(f"{uuid}@{member}", 1, self.barrier_ttl)
                and Barrier(backend, uuid, ttl=self.barrier_ttl).wait(block=False)
            )
        client = getattr(backend, "client", None)
        if type(backend).__name__ != "RedisBackend" or client is None:
            return None

        def count(uuid: str, member: str) -> bool:
            # In braces: one slot of a cluster.
            from importlib import resources

            script = client.register_script(resources.files(__package__).joinpath("count_member.lua").read_text())
            if not script(keys=[uuid, f"{{{uuid}}}@members"], args=[member, self.barrier_ttl]):
                return False
            backend.wait_notify(f"{uuid}@events", self.barrier_ttl)
            return True

        return count


def storing(results: StockResults) -> StockResults:
    """A Results that stores as `_Store` does.

    No subclass of it: where the worker finds no middleware of just that class, it warns of each result.
    """
    if isinstance(store := vars(results).get("after_process_message"), _Store) and store.results is results:
        return results
    ours = copy(results)
    ours.after_process_message = _Store(ours)  # type: ignore[method-assign]
    return ours


class _Store:
    """Stores a result; that of a job with an idempotency key is tried for some five seconds, as its completion is.

    Once the key is completed the job never runs again, and nobody could store what its duplicates move on with.
    """

    def __init__(self, results: StockResults) -> None:
        self.results = results

    def __call__(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        delivery: Delivery | None = getattr(message, "delivery", None)
        guarded = exception is None and delivery is not None and delivery.claim is not None and delivery.claim.keyed
        store: Any = partial(StockResults.after_process_message, self.results, broker, message, result=result)
        for pause in _PAUSES if guarded else ():
            try:
                store()
            except Exception:
                if not self._is_storable(result):
                    break
                clock.sleep(pause)
            else:
                return
        store(exception=exception)

    def _is_storable(self, result: Any) -> bool:
        """Whether the backend is what failed."""
        try:
            self.results.backend.encoder.encode({"result": result})
        except Exception:
            return False
        return True
