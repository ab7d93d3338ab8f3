"""Bring one message from the consumer to its acknowledgement."""

from __future__ import annotations
