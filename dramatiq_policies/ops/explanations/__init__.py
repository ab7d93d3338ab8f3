"""Explain the rule for an exception, and the schedule of retries."""

from __future__ import annotations

__all__ = ["exceptions", "explanation"]
