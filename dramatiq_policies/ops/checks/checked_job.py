"""An actor under check, and the settings of the check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dramatiq.middleware import Middleware

from ...common.middleware import find_middleware
from ...delivery.broker_state import BrokerState
from ...middleware.error_classifier import ErrorClassifier
from .broker_checks import named

if TYPE_CHECKING:
    from dramatiq import Actor

    from ...delivery.actor_policy import ActorPolicy

__all__ = ["CheckedJob", "Settings"]

M = TypeVar("M", bound=Middleware)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of the check outside of the application.

    Attributes:
      required_tags: The tags to require of every actor.
      shutdown_timeout_ms: The value of ``dramatiq --worker-shutdown-timeout``. Default: ten minutes, as Dramatiq's.
      consumer_timeout_ms: RabbitMQ's ``consumer_timeout``. Default: half an hour, as RabbitMQ's.
    """

    required_tags: tuple[str, ...] = ()
    shutdown_timeout_ms: int = 600_000
    consumer_timeout_ms: int = 1_800_000


@dataclass(slots=True)
class CheckedJob:
    """An actor under check: the actor, its policy and the broker's state."""

    actor: Actor[..., Any]
    policy: ActorPolicy
    state: BrokerState
    settings: Settings
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.options = self.actor.options

    @property
    def classifier(self) -> ErrorClassifier:
        """The broker's ErrorClassifier. `order_middleware` adds one if necessary."""
        found = self.one(ErrorClassifier)
        assert found is not None
        return found

    def one(self, kind: type[M]) -> M | None:
        return find_middleware(self.state.broker, kind)

    def named(self, name: str) -> Any:
        """Find a middleware by class name, without importing its module."""
        return named(self.state.broker, name)
