"""Which rule an exception meets, and the schedule of its retries."""

from __future__ import annotations
