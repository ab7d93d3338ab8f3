"""Call the observers of outcomes: middleware of dramatiq_policies, and the callables of the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..outcomes import Outcome, OutcomeEvent, StuckJob, Subscriber, logger

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from .delivery import Delivery

__all__ = ["Observer", "OutcomePublisher"]

#: Called with an outcome and its message (None if the message could not be read).
Observer = Callable[[OutcomeEvent, "MessageProxy | None"], object]


class OutcomePublisher:
    """The observers of one broker's outcomes.

    Attributes:
      successes_observed: Whether an observer wants successes, so that a success needs an `OutcomeEvent`.
      success_listeners: Called on success with the Delivery; they need no `OutcomeEvent`.
      stuck_subscribers: Called with each stuck job before ``on_stuck``, on a separate thread.
    """

    def __init__(self) -> None:
        self.successes_observed = False
        self.success_listeners: tuple[Callable[[Delivery], object], ...] = ()
        self.stuck_subscribers: list[Callable[[StuckJob], object]] = []
        self._entries: list[tuple[object, Observer, bool]] = []
        self._observers_of_success: tuple[Observer, ...] = ()
        self._observers_of_others: tuple[Observer, ...] = ()

    def subscribe(self, owner: object, subscriber: Subscriber) -> None:
        """Call a user's callable with every outcome."""
        self.observe(owner, lambda event, message: subscriber(event), subscriber)

    def observe(
        self, owner: object, observer: Observer, name: object = None, *, successes: bool = True, first: bool = False
    ) -> None:
        """Call an observer with every outcome. An error of the observer is logged and changes nothing.

        Parameters:
          owner: The middleware that observes; see `forget`.
          name: The observer's name in the log; the observer itself if None.
          successes: False leaves out successes.
          first: Call this observer before the others.
        """

        def guarded(event: OutcomeEvent, message: MessageProxy | None) -> None:
            try:
                observer(event, message)
            except BaseException:  # Not even an exit: it would end the worker's thread before the ack.
                logger.exception(
                    "The outcome subscriber %r raised an error; the message is not affected.", name or observer
                )

        self._entries.insert(0 if first else len(self._entries), (owner, guarded, successes))
        self._select()

    def forget(self, owner: object) -> None:
        """Remove the observers of a middleware that another middleware has replaced."""
        self._entries = [entry for entry in self._entries if entry[0] is not owner]
        self._select()

    def _select(self) -> None:
        self._observers_of_others = tuple(observer for _, observer, _ in self._entries)
        self._observers_of_success = tuple(observer for _, observer, successes in self._entries if successes)
        self.successes_observed = bool(self._observers_of_success)

    def notify_success(self, delivery: Delivery) -> None:
        """Call the success listeners before the acknowledgement. An error of a listener is logged and changes nothing."""
        for listener in self.success_listeners:
            try:
                listener(delivery)
            except BaseException:  # As above.
                logger.exception("%r raised an error; the message is not affected.", listener)

    def publish(self, event: OutcomeEvent, message: MessageProxy | None) -> None:
        """Call the observers of this kind of outcome."""
        succeeded = event.outcome is Outcome.SUCCEEDED
        for observer in self._observers_of_success if succeeded else self._observers_of_others:
            observer(event, message)
