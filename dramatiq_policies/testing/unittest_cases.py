"""For tests in the style of `unittest`."""

from __future__ import annotations

import unittest
from contextlib import ExitStack
from typing import Any

from dramatiq.brokers.stub import StubBroker

from .draining import drain
from .run import Run
from .stubbing import stub

__all__ = ["StubBrokerMixin"]


class StubBrokerMixin(unittest.TestCase):
    """A test case whose tests find the global broker's actors on a fresh StubBroker; goes with any other test case::

    class OrderTests(StubBrokerMixin, TransactionTestCase): ...

    Attributes:
      stub_broker: The StubBroker, in the global broker's place while a test runs.
    """

    stub_broker: StubBroker

    def setUp(self) -> None:
        super().setUp()
        stack = ExitStack()
        self.addCleanup(stack.close)
        self.stub_broker = stack.enter_context(stub())

    def drain(self, **options: Any) -> Run:
        """Run all that is queued to its end, as `dramatiq_policies.testing.drain` does, with its options."""
        return drain(self.stub_broker, **options)
