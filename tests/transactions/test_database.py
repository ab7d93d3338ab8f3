"""Which errors of which driver mean what; on real servers in tests/integration."""

from __future__ import annotations

import sqlite3

import pytest
import sqlalchemy as sa

from dramatiq_policies.transactions.database import (
    Result,
    for_update_skip_locked,
    has_rolled_back,
    is_disconnect,
    is_duplicate,
    is_missing_table,
    is_transient,
    list_params,
)


class OfPostgreSQL(Exception):
    def __init__(self, state):
        super().__init__("text of the server")
        self.sqlstate = state


class OfPsycopg2(Exception):
    def __init__(self, state):
        super().__init__("text of the server")
        self.pgcode = state


class OfMariaDB(Exception):
    def __init__(self, number):
        super().__init__(number, "text of the server")


class OfPg8000(Exception):
    def __init__(self, state):
        super().__init__({"S": "ERROR", "C": state, "M": "text of the server"})


class OfMariaDBConnector(Exception):
    def __init__(self, number, state):
        super().__init__("text of the server")
        self.errno, self.sqlstate = number, state


def bare(error):
    return error


def of_sqlalchemy(error):
    return sa.exc.DBAPIError("SELECT 1", {}, error)


def of_django(error):
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("django's") from cause
    except RuntimeError as wrapped:
        return wrapped


WRAPPED = [bare, of_sqlalchemy, of_django]
KINDS = {
    is_transient: [
        OfPostgreSQL("40001"),
        OfPostgreSQL("40P01"),
        OfPsycopg2("40P01"),
        OfPg8000("40P01"),
        OfMariaDBConnector(1213, "40001"),
        OfMariaDB(1213),
        OfMariaDB(1020),
        sqlite3.OperationalError("database is locked"),
        sqlite3.OperationalError("database table is locked: dramatiq_policies_keys"),
    ],
    is_disconnect: [
        OfPostgreSQL("08006"),
        OfPostgreSQL("57P01"),
        OfPg8000("57P01"),
        OfMariaDBConnector(2013, "HY000"),
        OfMariaDB(2006),
        OfMariaDB(2013),
        ConnectionResetError(104, "reset"),
    ],
    is_missing_table: [
        OfPostgreSQL("42P01"),
        OfPg8000("42P01"),
        OfMariaDBConnector(1146, "42S02"),
        OfMariaDB(1146),
        sqlite3.OperationalError("no such table: dramatiq_policies_keys"),
    ],
    is_duplicate: [
        OfPostgreSQL("23505"),
        OfPg8000("23505"),
        OfMariaDBConnector(1062, "23000"),
        OfMariaDB(1062),
        sqlite3.IntegrityError("UNIQUE constraint failed: dramatiq_policies_keys.name"),
    ],
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_error_is_recognised_however_wrapped(kind, wrap):
    for other, errors in KINDS.items():
        for error in errors:
            assert kind(wrap(error)) is (kind is other), error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error", [ValueError(1213), OSError(1213, "of the system"), KeyError(), OfPostgreSQL("42501"), OfMariaDB(1205)]
)
def test_other_errors_are_none_of_them(kind, error):
    if isinstance(error, ValueError):
        error.args = ("1213",)
    assert not kind(error)


@pytest.mark.parametrize("wrap", WRAPPED)
def test_mariadb_rolls_the_whole_transaction_back_after_some_errors(wrap):
    ended = [number for number in (1020, 1205, 1206, 1213) if has_rolled_back(wrap(OfMariaDB(number)))]
    assert ended == [1020, 1206, 1213]
    assert not has_rolled_back(wrap(OfPostgreSQL("40P01")))


def test_an_error_by_which_sqlalchemy_gave_up_the_connection_is_a_lost_connection():
    error = sa.exc.DBAPIError("SELECT 1", {}, OfMariaDB(1205), connection_invalidated=True)
    assert is_disconnect(error)


def test_an_error_that_is_its_own_cause_is_of_no_kind():
    error = RuntimeError("round and round")
    error.orig = error
    assert not is_disconnect(error)


def test_lists_of_like_lengths_make_one_statement():
    nine, ten, eleven = (list_params("id", list(range(length))) for length in (9, 10, 11))
    assert nine[0] == ten[0] != eleven[0]
    assert list(nine[1].values()) == [*range(9), 8]
    assert list(ten[1].values()) == [*range(10)]
    assert set(eleven[1].values()) == {*range(11)}


def test_a_list_longer_than_all_lengths_is_taken_whole():
    names, values = list_params("id", list(range(1_001)))
    assert names.count(":id") == len(values) == 1_001


class Server:
    def __init__(self, dialect, version=None):
        self.dialect, self.version = dialect, version

    def execute(self, sql, /, **params):
        assert self.version is not None, sql
        return Result([(self.version,)], 1)


@pytest.mark.parametrize(
    ("server", "end"),
    [
        (Server("postgresql"), " FOR UPDATE SKIP LOCKED"),
        (Server("sqlite"), ""),
        (Server("mysql", "10.6.0-MariaDB"), " FOR UPDATE SKIP LOCKED"),
        (Server("mysql", "10.11.19-MariaDB-0+deb12u1"), " FOR UPDATE SKIP LOCKED"),
        (Server("mysql", b"5.5.5-10.5.23-MariaDB"), " FOR UPDATE"),
        (Server("mysql", "8.0.39"), " FOR UPDATE SKIP LOCKED"),
        (Server("mysql", "8.4"), " FOR UPDATE SKIP LOCKED"),
        (Server("mysql", "5.7.44-log"), " FOR UPDATE"),
    ],
)
def test_rows_are_skipped_where_the_server_can(server, end):
    assert for_update_skip_locked(server) == end
