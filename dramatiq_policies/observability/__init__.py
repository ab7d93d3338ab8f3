"""Clients and thresholds: statsd, Sentry, queue alerts, the election of one monitor."""

from __future__ import annotations
