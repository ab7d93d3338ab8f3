"""``dramatiq.actor`` as type checkers are to see it: with every option spelt out.

Never imported at run time, where `dramatiq_policies.actor` is ``dramatiq.actor`` itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, overload

from dramatiq import Actor, Broker, Message
from dramatiq.actor import ActorDecorator

from .delivery.actor_policy import Exceptions, RetryOn

P = ParamSpec("P")
R = TypeVar("R")


@overload
def actor(fn: Callable[P, Awaitable[R]]) -> Actor[P, R]: ...


@overload
def actor(fn: Callable[P, R]) -> Actor[P, R]: ...


@overload
def actor(
    *,
    # Dramatiq's own.
    actor_class: Callable[..., Actor[Any, Any]] = ...,
    actor_name: str | None = ...,
    broker: Broker | None = ...,
    queue_name: str = ...,
    priority: int = ...,
    max_retries: int | None = ...,
    min_backoff: int = ...,
    max_backoff: int = ...,
    retry_when: Callable[[int, BaseException], bool] | None = ...,
    throws: type[BaseException] | Iterable[type[BaseException]] = ...,
    on_retry_exhausted: str | None = ...,
    on_failure: str | Actor[..., Any] | None = ...,
    on_success: str | Actor[..., Any] | None = ...,
    time_limit: float | None = ...,
    max_age: int | None = ...,
    notify_shutdown: bool = ...,
    pipe_ignore: bool = ...,
    pipe_target: Message[Any] | None = ...,
    store_results: bool = ...,
    result_ttl: int = ...,
    # The bundle's.
    retry_on: RetryOn = ...,
    discard_on: Exceptions = ...,
    alert_on: Exceptions = ...,
    broker_rules: bool = ...,
    after_discard: Callable[[Any, BaseException], object] | None = ...,
    dead_letter_discards: bool | None = ...,
    policy_exempt: Mapping[str, str] | None = ...,
    tags: Mapping[str, str] | None = ...,
    timeout: float | timedelta | None = ...,
    queue_timeout: float | timedelta | None = ...,
    idempotent: bool = ...,
    idempotency_key: str | Callable[..., Any] = ...,
    idempotency_ttl: int | timedelta = ...,
    done_when: Callable[..., object] = ...,
    max_crashes: int | None = ...,
) -> ActorDecorator: ...


def actor(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("only type checkers read this module")
