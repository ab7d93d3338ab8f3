"""The tables, as `create_tables` and as Alembic make them; on SQLite here, elsewhere in tests/integration."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from dramatiq_policies import ConfigurationError
from dramatiq_policies.sql import create_tables, metadata
from dramatiq_policies.transactions.database import KEYS, OUTBOX


@pytest.fixture
def engine(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/tables.db")
    yield engine
    engine.dispose()


def test_both_tables_are_made_and_made_again_nothing_happens(engine):
    for _ in range(2):
        create_tables(engine)
    assert sorted(sa.inspect(engine).get_table_names()) == [KEYS, OUTBOX]


def test_an_async_engine_serves_as_well_from_sync_code(engine):
    create_tables(create_async_engine(f"sqlite+aiosqlite:///{engine.url.database}"))
    assert sorted(sa.inspect(engine).get_table_names()) == [KEYS, OUTBOX]


def test_metadata_has_nothing_else():
    assert sorted(metadata.tables) == [KEYS, OUTBOX]


@pytest.mark.parametrize("wrong", ["sqlite:///tables.db", None, metadata])
def test_an_object_that_is_no_engine_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="expected an Engine or AsyncEngine of SQLAlchemy"):
        create_tables(wrong)


WITHOUT = """
import sys
sys.modules["sqlalchemy"] = None
try:
    import dramatiq_policies.sql
except ImportError as error:
    print(error)
"""


def test_without_sqlalchemy_the_error_names_the_extra():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert done.stdout == 'dramatiq_policies.sql needs SQLAlchemy 2: pip install "dramatiq-policies[sql]"\n'
