"""Redis: fetch, settle, recover, count and browse."""

from __future__ import annotations
