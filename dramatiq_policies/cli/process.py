"""Commands that run until they are stopped: ``monitor`` and ``outbox relay``."""

from __future__ import annotations

import logging
import signal
import threading

__all__ = ["run_until_stopped"]


def run_until_stopped() -> threading.Event:
    """Return an event that SIGTERM and Ctrl-C set, and write log records to stderr unless the application does so."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format="[%(asctime)s] [%(levelname)s] %(message)s")
    stop = threading.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: stop.set())
    return stop
