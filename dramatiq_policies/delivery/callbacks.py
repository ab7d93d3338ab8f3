"""The messages of ``on_success``, ``on_failure`` and ``on_retry_exhausted``: follow-up messages of a delivery."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dramatiq.errors import ActorNotFound

from ..common.safe_logger import SafeLogger
from .delivery import Delivery
from .outgoing import OutgoingMessage
from .refusals import Unsendable

if TYPE_CHECKING:
    from dramatiq.broker import Broker, MessageProxy

__all__ = ["add_exhausted_callback", "callback_messages", "callback_of"]

alerts = SafeLogger("dramatiq_policies.alerts")

_HOW_TO_FIND = "import the module that declares the actor, or correct the name"


def callback_of(broker: Broker, message: MessageProxy, option: str) -> str | None:
    """Return the callback's actor name from an option of the message, else of the actor; None without the option."""
    name: str | None = message.options.get(option)
    if not name:
        actor = broker.actors.get(message.actor_name)
        name = None if actor is None else actor.options.get(option)
    return name or None


def callback_messages(
    broker: Broker, delivery: Delivery, message: MessageProxy, option: str, target: str, details: object
) -> list[OutgoingMessage]:
    """Return the callback's message. Its arguments are the job's message as received, and ``details``.

    If this worker does not know the callback's actor after a failure, log a CRITICAL record and send no callback: the job's
    message stays, as a retry or a dead letter. After a success no message would stay, so raise.

    Parameters:
      option: ``on_success``, ``on_failure`` or ``on_retry_exhausted``.
      target: The name of the callback's actor.

    Raises:
      Unsendable: This worker does not know the actor of ``on_success``.
    """
    try:
        actor = broker.get_actor(target)
    except ActorNotFound:
        if option == "on_success":
            raise Unsendable(f"on_success: this worker has no actor {target!r}; {_HOW_TO_FIND}") from None
        alerts.critical(
            "%s: this worker has no actor %r, and sends no callback for message %s of actor %s; %s.",
            option,
            target,
            message.message_id,
            message.actor_name,
            _HOW_TO_FIND,
            extra={"actor": message.actor_name, "message_id": message.message_id},
        )
        return []
    delivery.restore_arguments(message)
    return [OutgoingMessage(actor.message(message.asdict(), details))]


def add_exhausted_callback(
    broker: Broker, delivery: Delivery, message: MessageProxy, retries: int, max_retries: int | None
) -> None:
    """Add the callback ``on_retry_exhausted`` to the follow-up messages, if the message or the actor names one."""
    option = "on_retry_exhausted"
    target = callback_of(broker, message, option)
    if target:
        details = {"retries": retries, "max_retries": max_retries}
        delivery.add_follow_up(lambda: callback_messages(broker, delivery, message, option, target, details))
