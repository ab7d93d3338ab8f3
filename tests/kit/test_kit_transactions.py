"""Sends inside transactions in the kit: on SQLite, with an outbox on the application's broker."""

from __future__ import annotations

from contextlib import contextmanager

import dramatiq
import pytest
import sqlalchemy as sa
from dramatiq import group, pipeline
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionFailed
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import StubBackend as StubLimits
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend as StubResults
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from dramatiq_policies import Idempotency, current_job, install
from dramatiq_policies.sql import SqlOutbox, SqlStore, create_tables
from dramatiq_policies.testing import (
    assert_crash_safe,
    crash,
    crash_safety,
    drain,
    enqueue_down,
    fail,
    perform,
    store_down,
    stub,
)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


class Shop:
    """An application with an outbox: it takes orders, each with a message in the transaction."""

    def __init__(self, engine, broker):
        self.engine = engine
        self.broker = broker
        self.outbox = SqlOutbox(engine)
        self.confirmed = []
        install(broker, outbox=self.outbox)

        @dramatiq.actor(broker=broker, actor_name="confirm", queue_name="mail")
        def confirm(order):
            self.confirmed.append(order)

        @dramatiq.actor(broker=broker, actor_name="take", queue_name="orders", max_retries=0)
        def take(order):
            with Session(engine) as session, session.begin(), self.outbox.within(session):
                session.merge(Order(id=order))
                confirm.send(order)

        self.confirm, self.take = confirm, take

    def order(self, number, *, commit=True):
        with Session(self.engine) as session, self.outbox.within(session):
            session.add(Order(id=number))
            self.confirm.send(number)
            session.commit() if commit else session.rollback()

    def orders(self):
        with Session(self.engine) as session:
            return sorted(session.scalars(sa.select(Order.id)))

    def rows(self):
        with self.engine.connect() as connection:
            return connection.scalar(sa.text("SELECT count(*) FROM dramatiq_policies_outbox"))

    def reset(self):
        self.confirmed.clear()
        with Session(self.engine) as session, session.begin():
            session.execute(sa.delete(Order))


@pytest.fixture
def engine(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/shop.db")
    create_tables(engine)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def shop(engine):
    return Shop(engine, StubBroker())


@pytest.fixture
def real(engine):
    """The same on a broker that nothing reaches."""
    return Shop(engine, RedisBroker(url="redis://127.0.0.1:1/0"))


def test_a_drain_runs_committed_messages_and_none_of_a_rollback(shop):
    shop.order(1)
    shop.order(2, commit=False)
    run = drain(shop.broker)
    run.assert_outcomes(shop.confirm, "succeeded")
    assert "confirm(1)" in repr(run)
    assert (shop.confirmed, shop.orders(), shop.rows()) == ([1], [1], 0)


def test_before_the_commit_there_is_nothing_to_drain(shop):
    with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
        shop.confirm.send(1)
        assert drain(shop.broker).events == []
    assert shop.confirmed == []
    drain(shop.broker).assert_outcomes(shop.confirm, "succeeded")


def test_a_stub_of_the_application_has_its_database(real):
    with stub(real.broker) as broker:
        real.order(1)
        real.order(2, commit=False)
        drain(broker).assert_outcomes(real.confirm, "succeeded")
    assert (real.confirmed, real.orders(), real.rows()) == ([1], [1], 0)


def test_rows_of_the_application_itself_are_left_alone_by_a_stub(real):
    # Nothing reaches its broker, so its row waits for a relay.
    real.outbox.wait = 0
    real.order(1)
    with stub(real.broker) as broker:
        real.order(2)
        drain(broker)
    assert (real.confirmed, real.rows()) == ([2], 1)


def test_jobs_send_in_transactions_too_and_a_job_that_fails_sends_nothing(shop):
    def break_before(order):
        with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
            shop.confirm.send(order)
            raise ValueError(order)

    broken = dramatiq.actor(break_before, broker=shop.broker, actor_name="broken", queue_name="orders", max_retries=0)
    shop.take.send(1)
    broken.send(2)
    run = drain(shop.broker)
    assert (run.outcomes(shop.take), run.outcomes(broken), shop.confirmed) == (["succeeded"], ["dead"], [1])


def test_perform_runs_one_job_and_drops_the_messages_that_it_commits(shop):
    assert perform(shop.take, 1).outcome == "succeeded"
    assert (shop.orders(), shop.confirmed, shop.rows()) == ([1], [], 0)
    assert drain(shop.broker).events == []


# Faults.


def test_with_the_broker_down_a_transaction_commits_and_a_drain_publishes_later(shop):
    with enqueue_down(shop.broker):
        shop.order(1)
        assert (shop.orders(), shop.rows()) == ([1], 1)
        with pytest.raises(ConnectionFailed):
            shop.confirm.send(9)
    run = drain(shop.broker)
    run.assert_outcomes(shop.confirm, "succeeded")
    assert (run.elapsed, shop.confirmed, shop.rows()) == (0, [1], 0)


def test_a_broker_that_comes_back_during_a_drain_gets_the_messages(shop):
    with enqueue_down(shop.broker, times=3):
        shop.order(1)
        run = drain(shop.broker)
    # The commit, and two tries of the drain.
    assert (shop.confirmed, run.elapsed, shop.rows()) == ([1], 3_000, 0)


def test_a_broker_that_stays_away_ends_the_drain_and_the_row_stays(shop):
    with enqueue_down(shop.broker):
        shop.order(1)
        run = drain(shop.broker)
        assert (run.events, run.elapsed, shop.rows()) == ([], 603_000, 1)
    drain(shop.broker).assert_outcomes(shop.confirm, "succeeded")


def test_a_drain_until_a_time_does_not_pass_it_for_the_outbox(shop):
    with enqueue_down(shop.broker):
        shop.order(1)
        assert drain(shop.broker, until=500).elapsed == 500
    assert drain(shop.broker, until=500).outcomes(shop.confirm) == ["succeeded"]


def test_a_message_committed_after_a_drain_with_the_broker_down_is_published_too(shop):
    with enqueue_down(shop.broker):
        shop.order(1)
        drain(shop.broker, until=0)
        shop.order(2)
    drain(shop.broker).assert_outcomes(shop.confirm, "succeeded", "succeeded")
    assert (sorted(shop.confirmed), shop.rows()) == ([1, 2], 0)


def test_the_faults_end_with_their_block(shop):
    with enqueue_down(shop.broker), enqueue_down(shop.broker, times=0):
        pass
    shop.order(1)
    assert shop.rows() == 0


# Crashes.


def test_a_worker_that_dies_in_a_job_leaves_nothing_of_its_transaction(shop):
    shop.take.send(1)
    with crash(shop.take):
        run = drain(shop.broker)
    run.assert_outcomes(shop.take, "succeeded")
    assert shop.confirmed == [1]


def test_a_message_of_a_job_s_transaction_survives_a_crash_between_commit_and_publication(shop):
    # A second confirmation does no harm here, a missing one would.
    assert_crash_safe(shop.take, 1, effects=lambda: (set(shop.confirmed), shop.orders()), reset=shop.reset)


def test_a_crash_after_the_commit_repeats_the_messages_of_a_job_without_a_key(shop):
    with pytest.raises(AssertionError) as caught:
        assert_crash_safe(shop.take, 1, effects=lambda: list(shop.confirmed), reset=shop.reset)
    assert "after a commit, before its messages are published" in str(caught.value)
    assert shop.rows() == 0


# Transactional jobs.


class Till(Shop):
    """An application whose jobs are transactional: a payment, what follows from it, and the completion of its key."""

    def __init__(self, engine, broker, *, transactional=True):
        self.engine = engine
        self.broker = broker
        self.receipts = []
        broker.add_middleware(GroupCallbacks(StubLimits()))
        broker.add_middleware(Results(backend=StubResults()))
        store = SqlStore(engine)
        install(broker, outbox=SqlOutbox(engine), idempotency=Idempotency(store))
        once = {"broker": broker, "idempotency_key": "{order}", "transactional": transactional, "max_retries": 0}

        @dramatiq.actor(broker=broker, actor_name="receipt", queue_name="mail", idempotent=True)
        def receipt(order):
            self.receipts.append(order)

        @dramatiq.actor(actor_name="pay", **once)
        def pay(order):
            with self.payment(order) as session:
                session.add(Order(id=order))
                receipt.send(order)
                session.flush()

        self.receipt, self.pay = receipt, pay

    @contextmanager
    def payment(self, order):
        """The session of the job; or one of its own, as without `transactional`."""
        if self.pay.options["transactional"]:
            yield current_job().session
            return
        with Session(self.engine) as session, session.begin():
            yield session

    def effects(self):
        return self.orders(), sorted(self.receipts)

    def reset(self):
        self.receipts.clear()
        with Session(self.engine) as session, session.begin():
            session.execute(sa.delete(Order))


def test_a_transactional_job_is_crash_safe_and_sends_once(engine):
    till = Till(engine, StubBroker())
    assert_crash_safe(till.pay, 7, effects=till.effects, reset=till.reset)
    assert till.rows() == 0


def test_a_job_without_its_transaction_is_not_crash_safe(engine):
    till = Till(engine, StubBroker(), transactional=False)
    with pytest.raises(AssertionError, match="pay is not crash-safe"):
        assert_crash_safe(till.pay, 7, effects=till.effects, reset=till.reset)


@pytest.mark.parametrize(
    ("line", "when", "end"),
    [
        (0, "after the last line of the job", "succeeded"),
        (-1, "after a commit, before its messages are published", "duplicate"),
        (-2, "after the commit of the job's transaction, before the ack", "duplicate"),
    ],
)
def test_a_worker_dies_before_the_commit_and_after(engine, line, when, end):
    till = Till(engine, StubBroker())
    scene = crash_safety._Scene(till.pay, (7,), {}, till.effects, till.reset)
    expected = scene.undisturbed()
    (point,) = (point for point in scene.points if point.line == line)
    assert when in scene.describe(point)
    effects, run = scene.play(die_at=point)
    assert (effects, run.outcomes(till.pay)) == (expected, [end])


def test_a_pipeline_and_a_group_of_transactional_jobs_go_on_in_a_drain(engine):
    till = Till(engine, StubBroker())
    done = till.receipt.message_with_options(args=(98,), pipe_ignore=True)
    pipeline([till.pay.message(3), done], broker=till.broker).run()
    some = group([till.pay.message(order) for order in (1, 2)], broker=till.broker)
    some.add_completion_callback(till.receipt.message(99))
    some.run()
    run = drain(till.broker)
    assert run.outcomes(till.pay) == ["succeeded"] * 3
    assert till.effects() == ([1, 2, 3], [1, 2, 3, 98, 99])


def test_with_the_store_down_a_transactional_job_waits(engine):
    till = Till(engine, StubBroker())
    till.pay.send(1)
    with store_down(till.broker, times=1):
        run = drain(till.broker)
    assert run.outcomes(till.pay) == ["deferred", "succeeded"]
    assert till.effects() == ([1], [1])


def test_with_the_broker_down_a_transactional_job_commits_and_its_messages_come_later(engine):
    till = Till(engine, StubBroker())
    till.pay.send(1)
    with enqueue_down(till.broker):
        assert drain(till.broker, until=0).outcomes(till.pay) == ["succeeded"]
        assert (till.orders(), till.receipts, till.rows()) == ([1], [], 1)
    drain(till.broker).assert_outcomes(till.receipt, "succeeded")
    assert till.effects() == ([1], [1])


def test_a_failed_transactional_job_leaves_nothing(engine):
    till = Till(engine, StubBroker())
    till.pay.send(1)
    with fail(till.pay, ValueError):
        drain(till.broker).assert_outcomes(till.pay, "dead")
    assert (till.effects(), till.rows()) == (([], []), 0)


def test_performing_a_transactional_job_commits_and_drops_its_messages(engine):
    till = Till(engine, StubBroker())
    assert perform(till.pay, 1).outcome == "succeeded"
    assert till.effects() == ([1], [])
