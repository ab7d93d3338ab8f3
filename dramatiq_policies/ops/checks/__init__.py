"""The findings of ``dramatiq-policies check``."""

from __future__ import annotations
