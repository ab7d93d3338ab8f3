"""The thread that publishes what a process has committed."""

from __future__ import annotations

import threading
import time

import pytest

from dramatiq_policies.transactions import publisher as module
from dramatiq_policies.transactions.outbox import Scope
from dramatiq_policies.transactions.publisher import Publisher, Ticket
from dramatiq_policies.transactions.scope import WrittenRows


def written(*ids):
    rows = WrittenRows()
    for row_id in ids:
        rows.add(row_id)
    return rows


def of(office, *numbers):
    """Rows that are committed."""
    rows = WrittenRows()
    for number in numbers:
        rows.add(office.insert(number, rows.owner))
    return rows


@pytest.fixture
def publisher(office):
    return Publisher(office.outbox.database, office.outbox.publication, 0.05)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "dramatiq-policies-outbox-publisher"]


def test_rows_are_published_and_deleted(office, publisher):
    publisher.submit(of(office, 1, 2)).wait(20)
    assert (office.queued(), office.rows()) == ([1, 2], [])


def test_rows_that_were_rolled_back_are_not(office, publisher):
    rows = of(office, 1)
    rows.add(404)
    publisher.submit(rows).wait(20)
    assert office.queued() == [1]


def test_a_lease_that_is_half_over_is_renewed_and_rows_of_others_are_left_to_them(office, publisher):
    rows = of(office, 1, 2)
    rows.since -= 3_600
    office.end_leases()
    (taken,) = office.run(office.table.take_due, "relay", 1)
    publisher.submit(rows).wait(20)
    assert office.queued() == [2]
    assert [row.id for row in office.rows()] == [taken.id]


def test_rows_whose_lease_is_half_over_are_taken_by_nobody_while_they_are_published(office, publisher, monkeypatch):
    rows = of(office, 1)
    rows.since -= 3_600
    office.end_leases()
    batch = office.outbox.publication.batch
    publish, taken = batch.publish, []

    def meanwhile(messages):
        taken.append(office.run(office.table.take_due, "relay", 10))
        return publish(messages)

    monkeypatch.setattr(batch, "publish", meanwhile)
    publisher.submit(rows).wait(20)
    assert (taken, office.queued()) == ([[]], [1])


def test_after_a_lost_connection_the_other_rows_are_left_to_the_relay(office, publisher, monkeypatch):
    tries = []
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 1)

    def publish(run, ids, owners, since):
        tries.append(ids)
        return ConnectionError("refused")

    monkeypatch.setattr(office.outbox.publication, "publish_committed", publish)
    rows = of(office, 1, 2)
    publisher.submit(rows).wait(20)
    assert tries == [rows.ids[:1]]


def test_many_rows_and_many_commits_at_once(office, publisher):
    tickets = [publisher.submit(of(office, *range(number, number + 3))) for number in range(0, 900, 3)]
    for ticket in tickets:
        ticket.wait(20)
    assert sorted(office.queued()) == list(range(900))


def test_an_idle_thread_ends_and_the_next_commit_starts_another(office, publisher, monkeypatch):
    monkeypatch.setattr(module, "_IDLE", 0.01)
    for number in range(5):
        publisher.submit(of(office, number)).wait(20)
        until = time.monotonic() + 20
        while publisher._thread is not None and time.monotonic() < until:
            time.sleep(0.001)
        assert publisher._thread is None
    assert office.queued() == list(range(5))


def test_a_child_begins_with_nothing(office, publisher):
    publisher.submit(of(office, 1)).wait(20)
    publisher.reset_after_fork()
    publisher.submit(of(office, 2)).wait(20)
    assert office.queued() == [1, 2]


def test_a_caller_does_not_wait_for_a_thread_that_is_stuck(office, publisher, monkeypatch):
    held = threading.Event()
    publish = office.outbox.batch.publish
    monkeypatch.setattr(office.outbox.batch, "publish", lambda messages: held.wait(20) and publish(messages))
    ticket = publisher.submit(of(office, 1))
    until = time.monotonic() + 20
    while not publisher.is_stuck() and time.monotonic() < until:
        time.sleep(0.005)
    assert publisher.is_stuck()
    ticket.wait(0.01)
    assert not ticket.is_done
    held.set()
    ticket.wait(20)
    assert not publisher.is_stuck()


def test_too_many_rows_are_left_to_the_relay(office, publisher, monkeypatch):
    monkeypatch.setattr(module, "_MOST_WAITING", -1)
    publisher.submit(of(office, 1)).wait(20)
    assert (office.queued(), len(office.rows())) == ([], 1)


def test_a_database_that_is_down_is_logged_once(office, publisher, monkeypatch, caplog):
    run = office.outbox.database.run
    monkeypatch.setattr(office.outbox.database, "run", lambda work: 1 / 0)
    for _ in range(3):
        publisher.submit(written(1)).wait(20)
    (line,) = caplog.records
    assert "at once (division by zero). A relay publishes them" in line.getMessage()
    monkeypatch.setattr(office.outbox.database, "run", run)
    publisher.submit(of(office, 1)).wait(20)
    assert office.queued() == [1]


def test_a_deletion_that_fails_is_tried_again_so_that_no_message_is_published_twice(office, publisher, monkeypatch):
    delete, tries = office.table.delete, []

    def refuse_twice(*args):
        tries.append(args)
        if len(tries) < 3:
            raise OSError("the database restarts")
        delete(*args)

    monkeypatch.setattr(office.table, "delete", refuse_twice)
    publisher.submit(of(office, 1)).wait(20)
    assert (office.queued(), office.rows()) == ([1], [])


def test_a_deletion_that_fails_until_the_lease_ends_says_that_the_messages_will_be_published_again(
    office, publisher, monkeypatch, caplog
):
    monkeypatch.setattr(office.table, "lease", 1)
    monkeypatch.setattr(office.table, "delete", lambda *args: 1 / 0)
    publisher.submit(of(office, 1)).wait(20)
    assert (office.queued(), len(office.rows())) == ([1], 1)
    assert "1 published messages could not be deleted from the outbox, and will be published again" in caplog.text


def test_a_waiting_caller_is_notified_when_the_publication_is_done():
    ticket, told = Ticket(WrittenRows()), []
    ticket.call_when_done(lambda: 1 / 0)
    ticket.call_when_done(lambda: told.append("later"))
    ticket.done()
    ticket.call_when_done(lambda: told.append("at once"))
    assert told == ["later", "at once"]


def test_owners_are_never_the_same():
    owners = {WrittenRows().owner for _ in range(1_000)}
    assert len(owners) == 1_000
    assert max(map(len, owners)) <= 64


def test_rows_are_published_once(office):
    rows = of(office, 1)
    assert office.outbox.after_commit(rows) is None  # inline, on a StubBroker
    assert office.outbox.after_commit(rows) is None
    assert office.queued() == [1]


def test_a_commit_never_raises(office, monkeypatch, caplog):
    monkeypatch.setattr(office.outbox.database, "run", lambda work: 1 / 0)
    assert office.outbox.after_commit(written(1)) is None
    assert "could not be published at once" in caplog.text


def test_a_scope_states_its_requirements(office):
    with pytest.raises(NotImplementedError):
        Scope().add(office.outbox, [])
