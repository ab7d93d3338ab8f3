"""One run per key: claims, leases, duplicates and the crash quarantine."""

from __future__ import annotations
