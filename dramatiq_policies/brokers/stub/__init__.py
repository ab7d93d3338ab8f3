"""StubBroker: consume, count and browse."""

from __future__ import annotations
