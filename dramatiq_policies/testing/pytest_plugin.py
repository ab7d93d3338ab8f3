"""pytest's fixtures, registered as the plugin ``dramatiq_policies``; ``-p no:dramatiq_policies`` turns them off."""

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
    """The global broker's actors on a StubBroker, in its place: `dramatiq_policies.testing.stub`."""
    from .stubbing import stub

    with stub() as broker:
        yield broker


@pytest.fixture
def drain(stub_broker: Broker) -> Callable[..., Run]:
    """``drain()``: run all that is queued on `stub_broker` to its end. It takes `dramatiq_policies.testing.drain`'s options."""
    from .draining import drain as drain_broker

    def run(**options: Any) -> Run:
        return drain_broker(stub_broker, **options)

    return run
