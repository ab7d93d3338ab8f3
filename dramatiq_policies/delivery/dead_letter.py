"""Build the dead letter of a message: in full, or small after the broker has refused the full one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .history import FAILURE, POLICIES, failure_of, replays_of
from .returned import RETURNED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dramatiq import Message
    from dramatiq.broker import MessageProxy

    from .decision import Decision
    from .delivery import Delivery

__all__ = ["dead_letter_of", "failure_to_keep"]


def failure_to_keep(
    message: MessageProxy, decision: Decision, tags: Mapping[str, str] | None, *, small: bool
) -> dict[str, Any]:
    """Return the option ``failure`` of a dead letter. A returned message carries its failure already.

    Parameters:
      small: Whether to leave out traceback and history.
    """
    options = message.options
    failure: dict[str, Any] = options[FAILURE] if RETURNED in options else failure_of(decision, options, tags)
    return {**failure, "traceback": None, "history": []} if small else failure


def dead_letter_of(message: MessageProxy, delivery: Delivery, failure: dict[str, Any], *, small: bool) -> Message[Any]:
    """Return the dead letter of a message.

    Parameters:
      failure: The option ``failure``.
      small: Whether to use the options as received. The job may have put values into the options that can't be encoded.
    """
    options = message.options
    received = delivery.received_message() if small else None
    dead: Message[Any] = (message if received is None else received).copy(queue_name=delivery.transport.queue_name)
    dead.options.pop(POLICIES, None)
    dead.options.pop(RETURNED, None)
    # The failure that a returned message carries is no sign of a replay.
    if replays := replays_of(options) - (RETURNED in options):
        dead.options[POLICIES] = {"replays": replays}
    dead.options[FAILURE] = failure
    return dead
