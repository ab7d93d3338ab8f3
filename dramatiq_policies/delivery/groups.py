"""Report groups whose callbacks can't run, because a member has failed permanently."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..common.safe_logger import OUTCOMES, SafeLogger

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from .decision import Decision

__all__ = ["group_of", "warn_of_incomplete_group"]

logger = SafeLogger(OUTCOMES)

#: The groups logged by this process, the oldest first.
_logged: OrderedDict[str, None] = OrderedDict()
_REMEMBERED = 1_000
#: A pipeline may be a member. The last step carries the group, nested in the options of the earlier steps.
_DEEPEST = 100


def group_of(options: Mapping[str, Any]) -> str | None:
    """Return the id of the group that a message, or a later step of its pipeline, belongs to."""
    found: Any = options
    for _ in range(_DEEPEST):
        if not isinstance(found, Mapping):
            return None
        if found.get("group_completion_callbacks"):
            return str(found.get("group_completion_uuid"))
        target = found.get("pipe_target")
        found = target.get("options") if isinstance(target, Mapping) else None
    return None


def warn_of_incomplete_group(message: MessageProxy, decision: Decision) -> None:
    """Log once per group and process that a member failed, and the completion callback is not sent."""
    options = message.options
    if "group_completion_callbacks" not in options and "pipe_target" not in options:
        return
    group = group_of(options)
    if group is None or group in _logged:
        return
    _logged[group] = None
    if len(_logged) > _REMEMBERED:
        _logged.popitem(last=False)
    logger.warning(
        "Group %s can't complete, and its callbacks don't run: member %s of actor %s ended as %s. %s",
        group,
        message.message_id,
        message.actor_name,
        decision.outcome.value,
        "Replay the dead letter of the member to complete the group."
        if decision.dead_letter
        else "The member left no dead letter; send the group again.",
        extra={"group": group, "actor": message.actor_name, "message_id": message.message_id},
    )
