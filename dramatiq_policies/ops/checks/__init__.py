"""What ``dramatiq-policies check`` finds."""

from __future__ import annotations
