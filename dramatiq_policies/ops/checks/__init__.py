"""The findings of ``dramatiq-policies check``."""

from __future__ import annotations

__all__ = ["actor_checks", "actor_summary", "checked_job", "findings", "gate", "live"]
