"""Django's migrations make the tables that `metadata` makes."""

from __future__ import annotations

import contextlib

import pytest
import sqlalchemy as sa
from django.core.management import call_command

from dramatiq_policies.sql import create_tables, metadata

from ..contrib.django import project
from .databases import own_database, with_driver

project.set_up()


@pytest.fixture
def two_databases(database_url, tmp_path):
    if database_url.startswith("sqlite"):
        yield f"sqlite:///{tmp_path}/one.sqlite3", f"sqlite:///{tmp_path}/two.sqlite3"
        return
    with own_database(database_url) as one, own_database(database_url) as two:
        yield one, two


@contextlib.contextmanager
def connected(url):
    engine = sa.create_engine(with_driver(url), poolclass=sa.NullPool)
    try:
        yield engine
    finally:
        engine.dispose()


def described(url):
    """All that the tables promise: columns with types, keys, indexes."""
    found = {}
    with connected(url) as engine:
        inspector = sa.inspect(engine)
        for name in metadata.tables:
            primary = inspector.get_pk_constraint(name)["constrained_columns"]
            found[name] = {
                "columns": [column_of(column, engine, primary) for column in inspector.get_columns(name)],
                "primary": primary,
                "indexes": {
                    index["name"]: (index["column_names"], index["unique"]) for index in inspector.get_indexes(name)
                },
            }
    return found


def column_of(column, engine, primary):
    counts = bool(column.get("identity")) or "nextval" in str(column["default"]) or column.get("autoincrement") is True
    if engine.dialect.name == "sqlite":
        counts = primary == [column["name"]] and str(column["type"]) == "INTEGER"  # an alias of the row's id
    default = None if counts else column["default"]
    # Without the collation, which is the database's in Django's tables.
    kind = column["type"].compile(engine.dialect).partition(" COLLATE")[0].partition(" CHARACTER SET")[0]
    return column["name"], kind, column["nullable"], default, counts


def test_django_s_tables_are_those_of_the_metadata(two_databases):
    by_metadata, by_django = two_databases
    with connected(by_metadata) as engine:
        create_tables(engine)
    with project.database("two", **project.options_of(by_django)):
        call_command("migrate", "dramatiq_policies", database="two", verbosity=0)
    expected = described(by_metadata)
    assert described(by_django) == expected
    assert {len(table["columns"]) for table in expected.values()} == {3, 13}
