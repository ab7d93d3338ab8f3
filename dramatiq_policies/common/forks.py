"""What must begin anew in a forked child: locks that another thread of the parent may hold, and what only that one does."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

__all__ = ["BeginsAnew", "after_fork"]


class BeginsAnew(Protocol):
    """Has state of its own in each process."""

    def reset_after_fork(self) -> None:
        """Called in a forked child, in which no other thread runs."""


_all: WeakSet[BeginsAnew] = WeakSet()


def after_fork(one: BeginsAnew) -> None:
    """Have it begin anew in every child, for as long as it lives."""
    _all.add(one)


def _after_fork_in_child() -> None:
    for one in list(_all):
        one.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
