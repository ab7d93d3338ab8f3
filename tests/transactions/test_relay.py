"""The relay, a step at a time."""

from __future__ import annotations

import threading

import pytest
from dramatiq.errors import ConnectionClosed

from dramatiq_policies.transactions import relay as module
from dramatiq_policies.transactions.outbox_table import MEMBER
from dramatiq_policies.transactions.relay import Relay


@pytest.fixture
def relay(office):
    return Relay(office.outbox.database, office.outbox.publication, "make it")


def test_rows_that_are_due_are_published_the_longest_due_first(office, relay):
    for number in range(3):
        office.insert(number, due=True)
    assert relay.relay() == (3, None)
    assert office.queued() == [0, 1, 2]
    assert relay.relay() == (0, None)


def test_a_batch_is_as_large_as_its_messages_are_small(office, relay, monkeypatch):
    monkeypatch.setattr(module, "_FIRST", 4)
    monkeypatch.setattr(relay, "_limit", 4)
    for number in range(30):
        office.insert(number, due=True)
    assert relay.relay()[0] == 4
    assert relay.relay()[0] == 26
    for _ in range(30):
        office.insert("x" * 500_000, due=True)
    assert relay.relay()[0] == 30
    office.insert(1, due=True)
    assert relay._limit == 10


def test_between_two_batches_there_is_no_pause_and_without_rows_there_is(office, relay):
    for number in range(20):
        office.insert(number, due=True)
    assert relay._step() == 0
    assert relay._step() == 1


def test_a_body_that_cannot_be_read_stops_no_other(office, relay, caplog):
    office.insert(1, due=True)
    office.insert(2, due=True, body=b"\xff")
    office.insert(3, due=True)
    relay.relay()
    assert office.queued() == [1, 3]
    (row,) = office.rows()
    assert row.failures == 1
    assert "DecodeError" in row.error
    assert "try 1" in caplog.text


def test_the_wait_of_a_row_doubles_up_to_a_minute(office, relay):
    office.insert(due=True, body=b"\xff")
    waits = []
    for _ in range(8):
        office.end_leases()
        relay.relay()
        waits.append(office.rows()[0].due_in_ms)
    expected = [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]
    assert all(limit - 900 < wait <= limit for wait, limit in zip(waits, expected, strict=True))


def test_a_broker_that_is_down_ends_the_batch_and_its_rows_do_not_wait_long(office, relay, monkeypatch, caplog):
    for number in range(3):
        office.insert(number, due=True)
    batch = office.outbox.batch
    publish = batch.publish
    monkeypatch.setattr(batch, "publish", lambda messages: [ConnectionClosed("down")] * len(messages))
    pauses = []
    for _ in range(12):
        office.end_leases()
        pauses.append(relay._step())
    assert pauses[:4] == [1, 2, 4, 5]
    assert {(row.failures, row.is_leased) for row in office.rows()} == {(12, False)}
    assert max(row.due_in_ms for row in office.rows()) <= 5_000
    assert [record.levelname for record in caplog.records].count("CRITICAL") == 1
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    monkeypatch.setattr(batch, "publish", publish)
    office.end_leases()
    relay._step()
    assert sorted(office.queued()) == [0, 1, 2]


def test_a_part_of_a_batch_may_be_through(office, relay, monkeypatch):
    for number in range(3):
        office.insert(number, due=True)
    batch = office.outbox.batch
    publish = batch.publish
    monkeypatch.setattr(batch, "publish", lambda some: [*publish(some[:1]), ConnectionClosed("down"), OSError("no")])
    taken, lost = relay.relay()
    assert taken == 3
    assert isinstance(lost, ConnectionClosed)
    assert office.queued() == [0]
    assert [row.error for row in office.rows()] == ["ConnectionClosed: down", "OSError: no"]


def test_the_batch_in_work_is_finished_at_the_shutdown(office, relay, monkeypatch):
    for number in range(3):
        office.insert(number, due=True)
    began, goes_on, stop = threading.Event(), threading.Event(), threading.Event()
    publish = office.outbox.batch.publish

    def slow(messages):
        began.set()
        assert goes_on.wait(20)
        return publish(messages)

    monkeypatch.setattr(office.outbox.batch, "publish", slow)
    thread = threading.Thread(target=relay.run, args=(stop,))
    thread.start()
    assert began.wait(20)
    stop.set()
    goes_on.set()
    thread.join(20)
    assert not thread.is_alive()
    assert (office.queued(), office.rows()) == ([0, 1, 2], [])


def test_a_database_that_is_down_is_logged_once_and_so_is_its_return(office, relay, monkeypatch, caplog):
    run = office.outbox.database.run
    monkeypatch.setattr(office.outbox.database, "run", lambda work: 1 / 0)
    for _ in range(3):
        relay._step()
    monkeypatch.setattr(office.outbox.database, "run", run)
    caplog.set_level("INFO")
    for _ in range(3):
        relay._step()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "The relay of the outbox can't publish (ZeroDivisionError: division by zero). The relay tries again.",
        "The relay of the outbox works again.",
    ]


def test_a_broker_that_is_down_is_logged_once_though_no_row_is_due_between_two_tries(
    office, relay, monkeypatch, caplog
):
    caplog.set_level("INFO")
    office.insert(1, due=True)
    with monkeypatch.context() as patch:
        patch.setattr(office.outbox.batch, "publish", lambda messages: [ConnectionClosed("down")] * len(messages))
        for _ in range(3):
            relay._step()
            assert relay._step() == 1.0
            office.end_leases()
    assert [row.failures for row in office.rows()] == [3]
    for _ in range(3):
        relay._step()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "The relay of the outbox can't publish (ConnectionClosed: down). The relay tries again.",
        "The relay of the outbox works again.",
    ]
    assert office.queued() == [1]


# Members of groups.


def member(office, number, **options):
    message = office.actor.message_with_options(args=(number,), **options)
    office.insert(number, due=True, kind=MEMBER, body=message.encode())


def test_the_last_member_of_a_group_brings_its_callbacks(office, relay):
    from dramatiq import group

    whole = group([office.actor.message(1), office.actor.message(2)], broker=office.broker)
    whole.add_completion_callback(office.actor.message("done"))
    whole.run()
    members = [office.broker.queues["mail"].get() for _ in range(2)]
    for body in members:
        assert office.queued() == []
        office.insert(due=True, kind=MEMBER, body=body)
        # Counted again: another process has died before it deleted the row.
        office.insert(due=True, kind=MEMBER, body=members[0])
        relay.relay()
    assert office.queued() == ["done"]
    for _ in range(2):
        office.insert(due=True, kind=MEMBER, body=members[1])
        office.insert(due=True, kind=MEMBER, body=members[0])
        relay.relay()
    assert office.queued() == ["done"] * 3
    assert office.rows() == []


def test_a_member_that_cannot_be_counted_is_counted_later(office, relay):
    from dramatiq.middleware import GroupCallbacks

    options = {"group_completion_uuid": "group", "group_completion_callbacks": [office.actor.message("done").asdict()]}
    member(office, 1, **options)
    (counting,) = [one for one in office.broker.middleware if isinstance(one, GroupCallbacks)]
    backend, counting.rate_limiter_backend = counting.rate_limiter_backend, None
    relay.relay()
    assert office.rows()[0].failures == 1
    counting.rate_limiter_backend = backend
    office.end_leases()
    relay.relay()
    assert (office.queued(), office.rows()) == (["done"], [])
    office.broker.middleware.remove(counting)
    member(office, 1, **options)
    relay.relay()
    assert "GroupCallbacks" in office.rows()[0].error


def test_a_group_with_a_refused_callback_brings_the_accepted_ones_once(office, relay, monkeypatch):
    batch = office.outbox.batch
    publish, tried = batch.publish, []

    def refusing(messages):
        tried.append([message.args[0] for message, _ in messages])
        refused = {"second", "last"} if len(tried) == 1 else {"last"} if len(tried) == 2 else set()
        accepted = [one for one in messages if one.message.args[0] not in refused]
        publish(accepted)
        return [None if one in accepted else OSError("no") for one in messages]

    monkeypatch.setattr(batch, "publish", refusing)
    callbacks = [office.actor.message(name).asdict() for name in ("first", "second", "third", "last")]
    member(office, 1, group_completion_uuid="group", group_completion_callbacks=callbacks)
    for _ in range(3):
        relay.relay()
        office.end_leases()
    assert tried == [["first", "second", "third", "last"], ["second", "last"], ["last"]]
    assert office.queued() == ["first", "third", "second", "last"]
    assert office.rows() == []


# While RabbitMQ confirms a batch, the relay takes the next one.


@pytest.fixture
def overlapping(office, relay, monkeypatch):
    """The relay of a broker that confirms with a delay; small batches."""
    batch = office.outbox.batch
    publish = batch.publish

    def slow(messages, meanwhile=None):
        results = publish(messages)
        if meanwhile is not None:
            meanwhile()
        return results

    monkeypatch.setattr(batch, "overlaps", True)
    monkeypatch.setattr(batch, "publish", slow)
    monkeypatch.setattr(module, "_LEAST", 2)
    monkeypatch.setattr(relay, "_limit", 2)
    monkeypatch.setattr(relay, "_most", 2)
    return relay


def test_the_next_batch_is_taken_while_a_full_one_is_confirmed(office, overlapping):
    for number in range(5):
        office.insert(number, due=True)
    assert overlapping.relay(ahead=True) == (2, None)
    assert [row.is_leased for row in office.rows()] == [True, True, False]
    assert overlapping.relay(ahead=True) == (2, None)
    assert overlapping.relay(ahead=True) == (1, None)
    assert overlapping.relay(ahead=True) == (0, None)
    assert office.queued() == list(range(5))


def test_a_batch_that_was_taken_ahead_is_published_at_the_shutdown(office, overlapping, monkeypatch):
    for number in range(6):
        office.insert(number, due=True)
    stop = threading.Event()
    publish = office.outbox.batch.publish

    def last(messages, meanwhile=None):
        results = publish(messages, meanwhile)
        stop.set()
        return results

    monkeypatch.setattr(office.outbox.batch, "publish", last)
    overlapping.run(stop)
    assert office.queued() == [0, 1, 2, 3]
    assert [row.is_leased for row in office.rows()] == [False, False]


def test_a_single_batch_by_hand_takes_nothing_ahead(office, overlapping):
    for number in range(4):
        office.insert(number, due=True)
    assert overlapping.relay() == (2, None)
    assert [row.is_leased for row in office.rows()] == [False, False]


def test_a_database_that_is_down_meanwhile_is_no_loss(office, overlapping, monkeypatch):
    for number in range(4):
        office.insert(number, due=True)
    take = overlapping._take
    with monkeypatch.context() as broken:
        broken.setattr(overlapping, "_take", lambda limit: take(limit) if limit == 3 else 1 / 0)
        overlapping._ahead = take(2)
        assert overlapping.relay(ahead=True) == (2, None)
    assert overlapping.relay(ahead=True) == (2, None)
    assert office.queued() == [0, 1, 2, 3]
