"""Transactional jobs with Django's ORM on PostgreSQL and MariaDB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import sqlalchemy as sa
from django.db import OperationalError, connections

from dramatiq_policies import current_job

from ..contrib.django import project
from .databases import deadlocking, with_driver

project.set_up()
from ..contrib.django.transactional_jobs import TWICE, Shop, TransactionalJobs  # noqa: E402 - its models need the project


class TestOnServers(TransactionalJobs):
    @pytest.fixture
    def alias(self, server_url: str) -> Iterator[str]:
        with project.database("jobs", **project.options_of(server_url)) as alias:
            yield alias


def test_a_job_that_goes_on_after_the_server_has_rolled_its_transaction_back_fails(mariadb_url: str) -> None:
    engine = sa.create_engine(with_driver(mariadb_url))
    with project.database("jobs", **project.options_of(mariadb_url)) as alias:
        project.make_tables(alias)
        shop = Shop(alias)

        def place(email: str) -> None:
            shop.create(email)
            shop.tell.send(email)
            if current_job().attempt == 1:
                with suppress(OperationalError), deadlocking(engine) as statement:
                    for number in (1, 2):
                        connections[alias].cursor().execute(statement(number))

        shop.actor(place, retry_on={OperationalError: TWICE}).send("ada")
        shop.drain()
        assert (shop.orders(), shop.told) == (["ada"], [("ada",)])
        assert shop.outcomes() == [("retried", None), ("succeeded", None)]
        shop.close()
    engine.dispose()
