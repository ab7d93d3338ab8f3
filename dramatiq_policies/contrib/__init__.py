"""Integrations with frameworks. Nothing here is imported by the rest of the package."""

from __future__ import annotations

__all__ = ["django"]
