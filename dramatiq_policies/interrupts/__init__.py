"""Runs a function and ends it in time: threads, coroutines and greenlets."""

from __future__ import annotations
