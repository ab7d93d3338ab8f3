"""Management commands of Django, found by their place."""

from __future__ import annotations
