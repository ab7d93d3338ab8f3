"""Commands that run until a signal stops them: ``monitor`` and ``outbox relay``."""

from __future__ import annotations

import logging
import signal
import threading

__all__ = ["prepare_long_run"]


def prepare_long_run() -> threading.Event:
    """Write log records to stderr unless the application has handlers, and return an event that SIGTERM and Ctrl-C set."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format="[%(asctime)s] [%(levelname)s] %(message)s")
    stop = threading.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: stop.set())
    return stop
