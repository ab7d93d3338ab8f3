"""Django's migrations of the tables of dramatiq_policies."""

from __future__ import annotations
