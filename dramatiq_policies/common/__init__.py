"""Leaves that every package may use: clocks, durations, callables, connections."""

from __future__ import annotations
