"""Leaves that every package may use: clocks, durations, callables, connections."""

from __future__ import annotations

__all__ = [
    "callables",
    "clock",
    "connections",
    "credentials",
    "current",
    "durations",
    "forks",
    "middleware",
    "plurals",
    "safe_logger",
    "texts",
    "throttle",
]
