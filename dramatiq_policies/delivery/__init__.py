"""One message from the consumer to its ack."""

from __future__ import annotations
