"""The Django application."""

from __future__ import annotations

from django.apps import AppConfig

__all__ = ["PoliciesConfig"]


class PoliciesConfig(AppConfig):  # type: ignore[misc]
    """``"dramatiq_policies.contrib.django"`` in ``INSTALLED_APPS``."""

    name = "dramatiq_policies.contrib.django"
    label = "dramatiq_policies"
    verbose_name = "Dramatiq policies"
