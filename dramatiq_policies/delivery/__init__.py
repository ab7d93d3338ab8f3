"""Bring one message from the consumer to its acknowledgement."""

from __future__ import annotations

__all__ = [
    "actor_options",
    "actor_policy",
    "broker_state",
    "callbacks",
    "consumer",
    "current_job",
    "decision",
    "delay_queue",
    "delivery",
    "direct",
    "executor",
    "failed_run",
    "groups",
    "history",
    "limits",
    "outgoing",
    "refusals",
    "returned",
    "settlement",
    "tracebacks",
    "transport",
    "validation",
]
