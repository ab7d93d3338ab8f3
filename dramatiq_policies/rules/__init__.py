"""Which rule decides on an exception, and how long to wait before a retry."""

from __future__ import annotations

__all__ = ["backoff", "matching", "parsing", "retry_after", "rule", "verdicts", "wait"]
