"""One run per key: claims, leases, duplicates and the crash quarantine."""

from __future__ import annotations

__all__ = [
    "actions",
    "batched_completion",
    "claim",
    "claims",
    "guard",
    "key_state",
    "keys",
    "options",
    "records",
    "services",
    "store_client",
]
