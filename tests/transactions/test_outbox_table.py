"""The rows of the outbox, on SQLite; on servers in tests/integration."""

from __future__ import annotations

import pytest

from dramatiq_policies.transactions.outbox_rows import OutboxRows, Selection
from dramatiq_policies.transactions.outbox_table import MESSAGE, NewRow, OutboxTable


class Statements:
    """A connection that counts its statements, with or without the ids that the driver reports."""

    def __init__(self, connection, *, reports_ids):
        self.connection, self.reports_ids, self.count = connection, reports_ids, 0
        self.dialect = connection.dialect

    def execute(self, sql, /, **params):
        self.count += 1
        result = self.connection.execute(sql, **params)
        return result if self.reports_ids else result._replace(last_id=None)


@pytest.mark.parametrize(("reports_ids", "statements"), [(True, 1), (False, 2)])
def test_an_inserted_row_is_known_by_its_id_whether_or_not_the_driver_reports_the_id(office, reports_ids, statements):
    office.insert()

    def insert(connection):
        counting = Statements(connection, reports_ids=reports_ids)
        return office.table.insert(counting, NewRow(MESSAGE, "second", "mail", "mail", b"body"), "me"), counting.count

    row_id, count = office.outbox.database.run(insert)
    assert [row.message_id for row in office.run(office.table.take, [row_id], ["me"])] == ["second"]
    assert count == statements


def test_a_row_belongs_to_its_owner_until_its_lease_ends(office):
    row_id = office.insert()
    assert [row.id for row in office.run(office.table.take, [row_id], ["me"])] == [row_id]
    assert office.run(office.table.take, [row_id], ["another"]) == []
    assert office.run(office.table.take_due, "another", 10) == []
    assert not office.run(office.table.has_due)
    office.end_leases()
    assert office.run(office.table.has_due)
    assert [row.id for row in office.run(office.table.take_due, "another", 10)] == [row_id]
    assert office.run(office.table.take, [row_id], ["me"]) == []
    assert office.run(office.table.take_due, "me", 10) == []


def test_a_lease_that_is_renewed_begins_anew(office):
    row_id = office.insert()
    office.end_leases()
    office.run(office.table.renew, [row_id], ["me"])
    assert not office.run(office.table.has_due)
    office.end_leases()
    office.run(office.table.renew, [row_id], ["another"])
    assert office.run(office.table.has_due)


def test_a_row_that_is_due_has_no_owner(office):
    office.insert(due=True)
    (row,) = office.rows()
    assert not row.is_leased
    assert office.run(office.table.has_due)


def test_rows_are_taken_in_order_and_no_more_than_asked_for(office):
    ids = [office.insert(number, due=True) for number in range(12)]
    assert [row.id for row in office.run(office.table.take_due, "me", 5)] == ids[:5]
    assert [row.id for row in office.run(office.table.take_due, "me", 50)] == ids[5:]
    assert [row.id for row in office.run(office.table.take, ids, ["me", "another"])] == ids


def test_only_the_owner_deletes_since_sqlite_may_give_an_id_again(office):
    row_id = office.insert(owner="earlier")
    office.run(office.table.delete, [row_id], ["earlier"])
    assert office.insert(owner="later") == row_id
    office.run(office.table.delete, [row_id], ["earlier"])
    assert len(office.rows()) == 1
    office.run(office.table.delete, [row_id], ["later"])
    assert office.rows() == []


def test_a_row_that_failed_waits_and_says_why(office):
    row_id = office.insert()
    office.run(office.table.fail, [row_id], ["me"], 5_000, "no\0 " + "x" * 2_000)
    (row,) = office.rows()
    assert (row.failures, row.is_leased) == (1, False)
    assert 0 < row.due_in_ms <= 5_000
    assert row.error == ("no " + "x" * 2_000)[:1_000]
    office.run(office.table.fail, [row_id], ["me"], 5_000, "not mine any more")
    assert office.rows()[0].failures == 1


def test_long_names_are_cut_for_the_list(office):
    row = office.table.insert
    from dramatiq_policies.transactions.outbox_table import NewRow

    office.run(row, NewRow("message", "m" * 300, "a" * 300, "q" * 300, b"body", 5), "me")
    (found,) = office.rows()
    assert {len(found.message_id), len(found.actor), len(found.queue)} == {255}


def test_a_retry_makes_rows_due_unless_they_are_being_published(office):
    office.insert(1)
    failed = office.insert(2)
    office.run(office.table.fail, [failed], ["me"], 60_000, "refused")
    assert office.run(office.outbox.rows.retry) == 1
    assert [row.id for row in office.run(office.table.take_due, "relay", 10)] == [failed]


def test_a_selection_is_by_message_actor_and_queue(office):
    for number in range(3):
        office.insert(number)
    first, second, _ = (row.message_id for row in office.rows())
    purge = office.outbox.rows.purge
    assert office.run(purge, Selection(actor="nobody")) == 0
    assert office.run(purge, Selection(queue="nowhere")) == 0
    assert office.run(purge, Selection(message_ids=[first], actor="nobody")) == 0
    assert office.run(purge, Selection(message_ids=[first, second], actor="mail", queue="mail")) == 2
    assert office.run(purge) == 1


def test_rows_are_counted(office):
    assert office.run(office.outbox.rows.stats) == (0, 0, 0)
    ids = [office.insert(number) for number in range(3)]
    office.execute("UPDATE dramatiq_policies_outbox SET created_at = created_at - 60000 WHERE id = :id", id=ids[0])
    office.run(office.table.fail, ids[:1], ["me"], 0, "refused")
    stats = office.run(office.outbox.rows.stats)
    assert (stats.pending, stats.failing) == (3, 1)
    assert 60_000 <= stats.oldest_ms < 90_000
    assert office.rows()[0].age_ms >= 60_000


def test_another_namespace_sees_nothing(office):
    office.insert(due=True)
    assert office.run(OutboxTable("other", 30_000, "sqlite").take_due, "me", 10) == []
    other = OutboxRows("other", "sqlite")
    assert office.run(other.list) == []
    assert office.run(other.purge) == 0
    assert office.run(other.stats).pending == 0
