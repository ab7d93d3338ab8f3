"""Lists, shows, replays and purges dead letters."""

from __future__ import annotations

__all__ = ["commands", "dead_letter", "search"]
