"""Reset state in a forked child: locks that a thread of the parent may hold, connections, threads."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

__all__ = ["ForkAware", "after_fork"]


class ForkAware(Protocol):
    """An object with state per process."""

    def reset_after_fork(self) -> None:
        """Called in the forked child, before other threads start."""


_all: WeakSet[ForkAware] = WeakSet()


def after_fork(one: ForkAware) -> None:
    """Call ``reset_after_fork`` in every forked child, for the lifetime of the object."""
    _all.add(one)


def _after_fork_in_child() -> None:
    for one in list(_all):
        one.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
