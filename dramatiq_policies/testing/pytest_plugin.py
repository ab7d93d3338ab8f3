"""Fixtures of the pytest plugin ``dramatiq_policies``; turn it off by ``-p no:dramatiq_policies``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dramatiq.broker import Broker

    from .run import Run

__all__ = ["drain", "stub_broker"]


@pytest.fixture
def stub_broker() -> Iterator[Broker]:
    """Replace the global broker by a StubBroker with the same actors: `dramatiq_policies.testing.stub`."""
    from .stubbing import stub

    with stub() as broker:
        yield broker


@pytest.fixture
def drain(stub_broker: Broker) -> Callable[..., Run]:
    """Return ``drain()``, which runs all queued messages of `stub_broker`, with the options of
    `dramatiq_policies.testing.drain`."""
    from .draining import drain as drain_broker

    def run(**options: Any) -> Run:
        return drain_broker(stub_broker, **options)

    return run
