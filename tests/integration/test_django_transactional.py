"""Transactional jobs with Django's ORM on PostgreSQL and MariaDB."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..contrib.django import project

project.set_up()
from ..contrib.django.transactional_jobs import TransactionalJobs  # noqa: E402 - its models need the project


class TestOnServers(TransactionalJobs):
    @pytest.fixture
    def alias(self, server_url: str) -> Iterator[str]:
        with project.database("jobs", **project.options_of(server_url)) as alias:
            yield alias
