"""The options that a declaration of an actor may have, and their types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict

from ..rules.rule import RetryPolicy, When

if TYPE_CHECKING:
    from dramatiq import Actor, Message

__all__ = [
    "ACTOR_OPTIONS",
    "ActorOptions",
    "BrokerExceptions",
    "BrokerRetryOn",
    "Exceptions",
    "RetryOn",
]

#: The options of dramatiq_policies that Dramatiq always accepts, so that our error can name a missing middleware.
ACTOR_OPTIONS = frozenset(
    {
        "after_discard",
        "alert_on",
        "broker_rules",
        "dead_letter_discards",
        "discard_on",
        "policy_exempt",
        "done_when",
        "idempotency_key",
        "idempotency_ttl",
        "idempotent",
        "max_crashes",
        "outbox",
        "retry_on",
        "tags",
        "transactional",
    }
)


#: The type of ``discard_on`` and ``alert_on``.
Exceptions = type[BaseException] | When | Sequence[type[BaseException] | When] | AbstractSet[type[BaseException] | When]
#: The type of ``retry_on``. Its keys are ``Any``: a mapping is invariant in its keys, and declared keys are checked at run time.
RetryOn = Exceptions | Mapping[Any, RetryPolicy | int]
#: The types of ``discard_on`` and ``alert_on``, and of ``retry_on``, of an ErrorClassifier: a class may be a dotted string.
BrokerExceptions = (
    Exceptions | str | Sequence[type[BaseException] | When | str] | AbstractSet[type[BaseException] | When | str]
)
BrokerRetryOn = BrokerExceptions | Mapping[Any, RetryPolicy | int]


class ActorOptions(TypedDict, total=False):
    """Every option of an actor with dramatiq_policies: the type of options that several actors share.

    Example::

        MAIL: ActorOptions = {"queue_name": "mail", "retry_on": SMTPException}

        @actor(**MAIL)
        def send_mail(user_id): ...
    """

    # Dramatiq's own.
    queue_name: str
    actor_name: str | None
    priority: int
    max_retries: int | None
    min_backoff: int
    max_backoff: int
    retry_when: Callable[[int, BaseException], bool] | None
    throws: type[BaseException] | Iterable[type[BaseException]]
    on_retry_exhausted: str | Actor[..., Any] | None
    on_failure: str | Actor[..., Any] | None
    on_success: str | Actor[..., Any] | None
    time_limit: float | None
    max_age: int | None
    notify_shutdown: bool
    pipe_ignore: bool
    pipe_target: Message[Any] | None
    store_results: bool
    result_ttl: int
    # Those of dramatiq_policies.
    retry_on: RetryOn
    discard_on: Exceptions
    alert_on: Exceptions
    broker_rules: bool
    after_discard: Callable[[Any, BaseException], object] | None
    dead_letter_discards: bool | None
    policy_exempt: Mapping[str, str] | None
    tags: Mapping[str, str] | None
    timeout: float | timedelta | None
    queue_timeout: float | timedelta | None
    idempotent: bool
    idempotency_key: str | Callable[..., Any]
    idempotency_ttl: int | timedelta
    done_when: Callable[..., object]
    max_crashes: int | None
    outbox: bool
    transactional: bool
