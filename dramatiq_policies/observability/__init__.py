"""Clients and thresholds: statsd, Sentry, queue alerts, the election of one monitor."""

from __future__ import annotations

__all__ = [
    "election",
    "fleet_election",
    "outbox_reader",
    "outcome_log",
    "private_files",
    "queue_gauges",
    "queue_thresholds",
    "sentry_patches",
    "statsd",
    "worker_log",
]
