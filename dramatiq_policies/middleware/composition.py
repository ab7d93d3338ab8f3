"""Dramatiq's composition middleware and Results, without lost messages.

Plain Dramatiq enqueues a pipeline's next step, a group's callbacks, and the messages of ``on_success`` and ``on_failure`` in an
after-hook. Dramatiq swallows the errors of hooks: the worker acknowledges the message, and the next step is lost. The versions
here publish the follow-up messages before the acknowledgement. Results that can't be stored are lost in the same way, although
a duplicate of a completed job may need the result.
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
from ..delivery.callbacks import callback_messages, callback_of
from ..delivery.delivery import Delivery
from ..delivery.outgoing import OutgoingMessage, Recorder
from ..interrupts import unwrap_interrupt
from ..outcomes import Outcome, text_of

if TYPE_CHECKING:
    from dramatiq.broker import Broker, MessageProxy

__all__ = ["Callbacks", "CountMember", "GroupCallbacks", "Pipelines", "reliable_results"]

#: The pauses between attempts to store a result, in seconds.
_STORE_PAUSES = (0.05, 0.2, 0.75, 1.5, 2.5)


def _recorded(
    stock: type[Middleware], middleware: Middleware, broker: Broker, message: MessageProxy, result: Any
) -> list[OutgoingMessage]:
    """Run Dramatiq's own code, and return the enqueued messages."""
    recorder = Recorder(broker)
    stock.after_process_message(middleware, recorder, message, result=result)  # type: ignore[arg-type]
    return recorder.sends


class Pipelines(StockPipelines):
    """Publish the next step of a pipeline before the worker acknowledges the message of the last."""

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        if exception is not None or message.failed or message.options.get("pipe_target") is None:
            return
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is None:
            StockPipelines.after_process_message(self, broker, message, result=result)
        elif not delivery.is_committed:
            delivery.add_follow_up(partial(_recorded, StockPipelines, self, broker, message, result))


class Callbacks(StockCallbacks):
    """Publish the messages of ``on_success`` and ``on_failure`` before the worker acknowledges the job's message.

    As in Dramatiq, ``on_failure`` receives each failed run. A snooze or an interrupt by a shutdown is no failed run.
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
        if target is None:
            return
        if exception is not None:
            delivery.add_follow_up(_failure_callback(broker, delivery, message, target, unwrap_interrupt(exception)))
        elif not delivery.is_committed:
            delivery.add_follow_up(partial(callback_messages, broker, delivery, message, option, target, result))


def _failure_callback(
    broker: Broker, delivery: Delivery, message: MessageProxy, target: str, error: BaseException
) -> Callable[[], list[OutgoingMessage]]:
    """Return a function that returns the message of ``on_failure``, once the decision is made."""
    details = {"type": type(error).__name__, "message": text_of(error)}

    def failure_messages() -> list[OutgoingMessage]:
        decision = delivery.decision
        if decision is not None and decision.outcome in _NO_FAILURES:
            return []
        return callback_messages(broker, delivery, message, "on_failure", target, details)

    return failure_messages


#: The outcomes of runs that raised but did not fail.
_NO_FAILURES = frozenset({Outcome.DEFERRED, Outcome.INTERRUPTED})


class GroupCallbacks(StockGroupCallbacks):
    """Count a group's members, and publish the callbacks before the worker acknowledges the last member.

    With barriers on Redis or in memory each member counts once, by its message id. With other backends (Memcached) a barrier is a
    plain counter: a member that is redelivered after it was counted counts twice.
    """

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        options = message.options
        if exception is not None or message.failed or not options.get("group_completion_callbacks"):
            return
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is None:
            StockGroupCallbacks.after_process_message(self, broker, message, result=result)
        elif not delivery.is_committed:
            delivery.add_follow_up(CountMember(self, broker, message, result))

    def counter(self) -> Callable[[str, str], bool] | None:
        """Return a function that counts a member, and returns whether this member completes the group.

        The function may be called again for the same member: the answer is the same. None if the backend can't count once.
        """
        backend: Any = self.rate_limiter_backend
        if isinstance(backend, StubBackend):

            def count_in_memory(uuid: str, member: str) -> bool:
                completing = f"{uuid}@>{member}"
                if not backend.add(f"{uuid}@{member}", 1, self.barrier_ttl):
                    # An amount of 0 only reads: it is refused below the minimum.
                    return bool(backend.decr(completing, 0, 1, self.barrier_ttl))
                if not Barrier(backend, uuid, ttl=self.barrier_ttl).wait(block=False):
                    return False
                return bool(backend.add(completing, 1, self.barrier_ttl))

            return count_in_memory
        client = getattr(backend, "client", None)
        if type(backend).__name__ != "RedisBackend" or client is None:
            return None

        def count(uuid: str, member: str) -> bool:
            # Braces keep both keys in one slot of a cluster.
            from importlib import resources

            script = client.register_script(resources.files(__package__).joinpath("count_member.lua").read_text())
            if not script(keys=[uuid, f"{{{uuid}}}@members"], args=[member, self.barrier_ttl]):
                return False
            backend.wait_notify(f"{uuid}@events", self.barrier_ttl)
            return True

        return count


class CountMember:
    """A follow-up step: count a member, and return the group's callbacks if the group is complete."""

    __slots__ = ("broker", "groups", "message", "result")

    def __init__(self, groups: GroupCallbacks, broker: Broker, message: MessageProxy, result: Any) -> None:
        self.groups = groups
        self.broker = broker
        self.message = message
        self.result = result

    def __call__(self) -> list[OutgoingMessage]:
        options, count = self.message.options, self.groups.counter()
        if count is None:
            return _recorded(StockGroupCallbacks, self.groups, self.broker, self.message, self.result)
        if not count(options["group_completion_uuid"], self.message.message_id):
            return []
        return [OutgoingMessage(Message(**callback)) for callback in options["group_completion_callbacks"]]


def reliable_results(results: StockResults) -> StockResults:
    """Return a copy of a Results that stores by `_Store`.

    The copy is no subclass: the worker logs a warning for each result if no middleware has exactly the class Results.
    """
    if isinstance(store := vars(results).get("after_process_message"), _Store) and store.results is results:
        return results
    ours = copy(results)
    ours.after_process_message = _Store(ours)  # type: ignore[method-assign]
    return ours


def _is_recorded(delivery: Delivery) -> bool:
    """Whether the job never runs again once its end is recorded."""
    return delivery.is_committed or (delivery.claim is not None and delivery.claim.keyed)


class _Store:
    """Store a result; retry for about five seconds if the job has an idempotency key.

    After the key is completed the job never runs again. So nothing could store the result for its duplicates later.
    """

    def __init__(self, results: StockResults) -> None:
        self.results = results

    def __call__(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        delivery: Delivery | None = getattr(message, "delivery", None)
        must_be_stored = exception is None and delivery is not None and _is_recorded(delivery)
        store: Any = partial(StockResults.after_process_message, self.results, broker, message, result=result)
        for pause in _STORE_PAUSES if must_be_stored else ():
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
        """Return whether the result can be encoded, so that the backend has failed."""
        try:
            self.results.backend.encoder.encode({"result": result})
        except Exception:
            return False
        return True
