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
from .patching import expect_actor
from .stub_environment import environment_of
from .stubbing import stub

if TYPE_CHECKING:
    from dramatiq import Actor

__all__ = ["perform"]


def perform(actor: Actor[..., Any], *args: Any, **kwargs: Any) -> OutcomeEvent:
    """Run one message of an actor once, with all middleware, and return the outcome::

        def test_a_missing_order_is_discarded():
            event = perform(send_confirmation, 404, "ada@example.com")
            assert event.outcome == "discarded"

    Follow-up messages (a retry, the next step of a pipeline, a dead letter, messages sent by the job) are accepted and dropped.
    Earlier messages stay in their queues and don't run. An actor of a real broker is lent to a StubBroker.

    Parameters:
      args, kwargs: The arguments of the message.

    Raises:
      ConfigurationError: ``actor`` is no actor.
      TypeError: An argument can't be encoded.
      AssertionError: The worker died during the job (`crash`), without an outcome.
    """
    expect_actor("perform()", actor)
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
    """Replace the broker's queues by empty queues."""
    queues, dead_letters = broker.queues, broker.dead_letters_by_queue
    broker.queues = {name: Queue() for name in queues}
    broker.dead_letters_by_queue = defaultdict(list)
    try:
        yield
    finally:
        broker.queues, broker.dead_letters_by_queue = queues, dead_letters
