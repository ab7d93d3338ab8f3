"""Tests of jobs without a server, a thread or a wait: `drain` a StubBroker, let things go wrong, and look at the `Run`."""

from __future__ import annotations

from ..ops.checks.gate import assert_job_ready
from .crash_safety import assert_crash_safe
from .draining import TooManyRuns, drain
from .faults import crash, fail, hang, redeliver
from .outages import enqueue_down, store_down
from .performing import perform
from .run import Run
from .store_contract import IdempotencyStoreContract
from .stubbing import stub
from .unittest_cases import StubBrokerMixin

__all__ = [
    "IdempotencyStoreContract",
    "Run",
    "StubBrokerMixin",
    "TooManyRuns",
    "assert_crash_safe",
    "assert_job_ready",
    "crash",
    "drain",
    "enqueue_down",
    "fail",
    "hang",
    "perform",
    "redeliver",
    "store_down",
    "stub",
]
