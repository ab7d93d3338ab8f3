"""`perform`: run a single message once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from queue import Queue
from typing import TYPE_CHECKING, Any

from dramatiq.brokers.stub import StubBroker

from ..outcomes import OutcomeEvent
from .draining import Drain
from .stub_environment import environment_of
from .stubbing import stub

if TYPE_CHECKING:
    from dramatiq import Actor

__all__ = ["perform"]


def perform(actor: Actor[..., Any], *args: Any, **kwargs: Any) -> OutcomeEvent:
    """Run one message of an actor once, through the whole pipeline, and say how that ended.

    What follows from it (a retry, the next stage, a dead letter, messages that the job sends) is accepted and dropped;
    what was queued before stays, and is not run. An actor of another broker is lent to a StubBroker for it.

    Raises:
      TypeError: An argument can't be sent.
      AssertionError: The worker died in the job (`crash`), so that there was no outcome.
    """
    with ExitStack() as stack:
        broker = actor.broker
        if not isinstance(broker, StubBroker):
            broker = stack.enter_context(stub(broker))
        environment = environment_of(broker)
        stack.enter_context(_empty(broker))
        actor.send(*args, **kwargs)
        with Drain(environment) as work:
            work.step()
        if not work.run.events:
            raise AssertionError(f"perform() had no outcome.\n{work.run!r}")
        return work.run.events[0]


@contextmanager
def _empty(broker: StubBroker) -> Iterator[None]:
    """Empty queues in the place of the broker's own."""
    queues, dead_letters = broker.queues, broker.dead_letters_by_queue
    broker.queues = {name: Queue() for name in queues}
    broker.dead_letters_by_queue = defaultdict(list)
    try:
        yield
    finally:
        broker.queues, broker.dead_letters_by_queue = queues, dead_letters
