"""The kit's own plugin, also where the package is on the path and not installed."""

from __future__ import annotations

from dramatiq_policies.testing import pytest_plugin


def pytest_configure(config):
    if not config.pluginmanager.is_registered(pytest_plugin):
        config.pluginmanager.register(pytest_plugin, "dramatiq_policies")
