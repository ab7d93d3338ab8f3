"""Write a job and its tests from a design."""

from __future__ import annotations

__all__ = ["design", "scaffold"]
