"""Integrations with frameworks, which the rest of the package never imports."""

from __future__ import annotations

__all__ = ["django"]
