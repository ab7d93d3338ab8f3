"""The Django application."""

from __future__ import annotations

from django.apps import AppConfig

from ...interrupts.listeners import after_each_interrupt

__all__ = ["PoliciesConfig"]


class PoliciesConfig(AppConfig):  # type: ignore[misc]
    """``"dramatiq_policies.contrib.django"`` in ``INSTALLED_APPS``."""

    name = "dramatiq_policies.contrib.django"
    label = "dramatiq_policies"
    verbose_name = "Dramatiq policies"

    def ready(self) -> None:
        from .connections import close_interrupted_connections

        after_each_interrupt(close_interrupted_connections)
