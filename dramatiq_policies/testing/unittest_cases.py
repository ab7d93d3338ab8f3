"""The test kit for `unittest`."""

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
    """Replace the global broker by a fresh StubBroker in each test; combine it with any test case::

        class OrderTests(StubBrokerMixin, TransactionTestCase): ...

    Attributes:
      stub_broker: The StubBroker of the running test.
    """

    stub_broker: StubBroker

    def setUp(self) -> None:
        super().setUp()
        stack = ExitStack()
        self.addCleanup(stack.close)
        self.stub_broker = stack.enter_context(stub())

    def drain(self, **options: Any) -> Run:
        """Run all queued messages. Options as for `dramatiq_policies.testing.drain`."""
        return drain(self.stub_broker, **options)
