"""Transactional jobs with Django's ORM on PostgreSQL and MariaDB."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..contrib.django import project
from .databases import make_empty_tables

project.set_up()
from ..contrib.django.transactional_jobs import TransactionalJobs  # noqa: E402 - its models need the project


class TestOnServers(TransactionalJobs):
    @pytest.fixture(params=["postgresql", "mariadb"])
    def alias(self, request: pytest.FixtureRequest) -> Iterator[str]:
        url: str = request.getfixturevalue(f"{request.param}_url")
        make_empty_tables(url)
        with project.database("jobs", **project.options_of(url)) as alias:
            yield alias
