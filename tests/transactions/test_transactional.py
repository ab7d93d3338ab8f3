"""Declarations of transactional jobs, and transactional jobs in the test kit."""

from __future__ import annotations

import dramatiq
import pytest
import sqlalchemy as sa
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, StaticPool

from dramatiq_policies import ConfigurationError, Idempotency, current_job, install
from dramatiq_policies.sql import SqlOutbox, SqlStore, create_tables
from dramatiq_policies.stores.memory import MemoryStore
from dramatiq_policies.testing import assert_crash_safe, drain, stub

from .transactional_jobs import Base, Payment


@pytest.fixture
def engine(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/shop.db")
    create_tables(engine)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def broker_with(**bundle):
    broker = StubBroker()
    broker.add_middleware(AsyncIO())
    return install(broker, **bundle)


def pay(order):
    current_job().session.add(Payment(order=order))


async def pay_later(order):
    pass


def declare(broker, fn=pay, **options):
    return dramatiq.actor(fn, broker=broker, actor_name="pay", **{"transactional": True, **options})


def test_an_actor_is_declared_with_an_id_as_its_key_or_a_key_of_its_own(engine):
    broker = broker_with(outbox=SqlOutbox(engine), idempotency=Idempotency(SqlStore(engine)))
    declare(broker, idempotent=True)
    dramatiq.actor(pay, broker=broker, actor_name="other", transactional=True, idempotency_key="{order}")
    dramatiq.actor(pay, broker=broker, actor_name="plain", transactional=False)


def test_an_actor_with_transactions_needs_a_key(engine):
    broker = broker_with(outbox=SqlOutbox(engine), idempotency=Idempotency(SqlStore(engine)))
    with pytest.raises(ConfigurationError, match=r"actor 'pay': transactional=True needs a key\. Add idempotent=True"):
        declare(broker)


def test_an_actor_with_transactions_needs_an_outbox(engine):
    broker = broker_with(idempotency=Idempotency(SqlStore(engine)))
    with pytest.raises(
        ConfigurationError, match=r"needs an outbox in your database. Call install\(broker, outbox=SqlOut"
    ):
        declare(broker, idempotent=True)


@pytest.mark.parametrize("idempotency", [Idempotency(MemoryStore()), None, False])
def test_an_actor_with_transactions_needs_its_keys_in_a_database(engine, idempotency):
    broker = broker_with(outbox=SqlOutbox(engine), idempotency=idempotency)
    with pytest.raises(ConfigurationError) as raised:
        declare(broker, **({} if idempotency is False else {"idempotent": True}))
    assert "needs the idempotency keys in the outbox's database" in str(raised.value)
    assert "idempotency=Idempotency(SqlStore(engine))" in str(raised.value)


def test_an_actor_with_transactions_needs_keys_and_outbox_in_one_database(engine, tmp_path):
    other = sa.create_engine(f"sqlite:///{tmp_path}/other.db")
    broker = broker_with(outbox=SqlOutbox(engine), idempotency=Idempotency(SqlStore(other)))
    with pytest.raises(ConfigurationError, match=r"the keys are in another\. Pass the same engine"):
        declare(broker, idempotent=True)


def test_two_engines_of_one_database_will_do(engine):
    other = sa.create_engine(engine.url)
    broker = broker_with(outbox=SqlOutbox(engine), idempotency=Idempotency(SqlStore(other)))
    declare(broker, idempotent=True)


def test_a_sync_actor_needs_a_sync_engine_and_an_async_actor_an_async_one(engine):
    aengine = create_async_engine(f"sqlite+aiosqlite:///{engine.url.database}", poolclass=NullPool)
    with pytest.raises(ConfigurationError, match="needs an async engine, because the actor is an async actor"):
        declare(
            broker_with(outbox=SqlOutbox(engine), idempotency=Idempotency(SqlStore(engine))), pay_later, idempotent=True
        )
    with pytest.raises(ConfigurationError, match="needs a sync engine, because the actor is a sync actor"):
        declare(broker_with(outbox=SqlOutbox(aengine), idempotency=Idempotency(SqlStore(aengine))), idempotent=True)


def test_an_engine_without_transactions_is_refused(engine):
    other = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT")
    broker = broker_with(outbox=SqlOutbox(other), idempotency=Idempotency(SqlStore(other)))
    with pytest.raises(ConfigurationError, match="the engine has the isolation level AUTOCOMMIT"):
        declare(broker, idempotent=True)


def test_the_option_is_a_bool(engine):
    broker = broker_with(outbox=SqlOutbox(engine), idempotency=Idempotency(SqlStore(engine)))
    with pytest.raises(ConfigurationError, match="transactional: expected True or False, got 'yes'"):
        declare(broker, transactional="yes", idempotent=True)


def test_brokers_without_transactional_actors_run_nothing_more_around_a_job(engine):
    broker = broker_with(outbox=SqlOutbox(engine), idempotency=Idempotency(SqlStore(engine)))
    (outbox,) = [one for one in broker.middleware if isinstance(one, SqlOutbox)]
    before = outbox.attached_to.run_around_job
    dramatiq.actor(pay, broker=broker, actor_name="plain", idempotent=True)
    assert outbox.attached_to.run_around_job is before
    declare(broker, idempotent=True)
    assert outbox.attached_to.run_around_job is not before


def test_in_a_stub_the_database_is_the_same_and_the_keys_are_fresh(engine):
    broker = broker_with(outbox=SqlOutbox(engine), idempotency=Idempotency(SqlStore(engine)))
    actor = declare(broker, idempotency_key="{order}")
    for _ in range(2):
        with stub(broker) as on_stub:
            actor.send(7)
            actor.send(7)
            drain(on_stub)
    with Session(engine) as session:
        assert list(session.scalars(sa.select(Payment.order))) == [7, 7]


def test_in_a_stub_a_database_in_memory_works():
    engine = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    create_tables(engine)
    Base.metadata.create_all(engine)
    broker = broker_with(outbox=SqlOutbox(engine), idempotency=Idempotency(SqlStore(engine)))
    actor = declare(broker, idempotency_key="{order}")
    with stub(broker) as on_stub:
        actor.send(7)
        actor.send(7)
        drain(on_stub)
    with Session(engine) as session:
        assert list(session.scalars(sa.select(Payment.order))) == [7]


class Till:
    """An engine's payments, as `assert_crash_safe` looks at them."""

    def __init__(self, engine):
        self.engine = engine

    def effects(self):
        with Session(self.engine) as session:
            return sorted(session.scalars(sa.select(Payment.order)))

    def reset(self):
        with Session(self.engine) as session, session.begin():
            session.execute(sa.delete(Payment))


def test_a_transactional_job_is_crash_safe(engine):
    till = Till(engine)
    broker = broker_with(outbox=SqlOutbox(engine), idempotency=Idempotency(SqlStore(engine)))

    def pay_twice(order):
        session = current_job().session
        session.add(Payment(order=order))
        session.flush()
        session.add(Payment(order=order))

    actor = declare(broker, pay_twice, idempotency_key="{order}")
    assert_crash_safe(actor, 7, effects=till.effects, reset=till.reset)


def test_an_async_transactional_job_is_crash_safe(engine):
    till = Till(engine)
    aengine = create_async_engine(f"sqlite+aiosqlite:///{engine.url.database}", poolclass=NullPool)
    broker = broker_with(outbox=SqlOutbox(aengine), idempotency=Idempotency(SqlStore(aengine)))

    async def pay_twice(order):
        session = current_job().session
        session.add(Payment(order=order))
        await session.flush()
        session.add(Payment(order=order))

    actor = declare(broker, pay_twice, idempotency_key="{order}")
    assert_crash_safe(actor, 7, effects=till.effects, reset=till.reset)


def test_a_job_with_a_key_and_its_own_commit_is_not_crash_safe(engine):
    till = Till(engine)
    broker = broker_with(idempotency=Idempotency(SqlStore(engine)))

    def pay_twice(order):
        with Session(engine) as session:
            session.add(Payment(order=order))
            session.commit()
            session.add(Payment(order=order))
            session.commit()

    actor = declare(broker, pay_twice, idempotency_key="{order}", transactional=False)
    with pytest.raises(AssertionError, match="is not crash-safe"):
        assert_crash_safe(actor, 7, effects=till.effects, reset=till.reset)
