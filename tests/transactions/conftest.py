"""An outbox on SQLite and a StubBroker."""

from __future__ import annotations

import dramatiq
import pytest
import sqlalchemy as sa
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import StubBackend

from dramatiq_policies import install
from dramatiq_policies.sql import SqlOutbox, create_tables
from dramatiq_policies.transactions.outbox_table import MESSAGE, NewRow


class Office:
    """An outbox, its rows, and the queue that they go to."""

    def __init__(self, path, **options):
        self.engine = sa.create_engine(f"sqlite:///{path}/outbox.db")
        create_tables(self.engine)
        self.broker = StubBroker()
        self.broker.add_middleware(GroupCallbacks(StubBackend()))
        self.outbox = SqlOutbox(self.engine, **options)
        install(self.broker, outbox=self.outbox)
        self.actor = dramatiq.actor(print, broker=self.broker, actor_name="mail", queue_name="mail")

    @property
    def table(self):
        return self.outbox.table

    def run(self, method, *args, **kwargs):
        """Call a method of the table with a connection."""
        return self.outbox.database.run(lambda connection: method(connection, *args, **kwargs))

    def insert(self, number=1, owner="me", *, due=False, body=None, kind=MESSAGE):
        message = self.actor.message(number)
        encoded = message.encode() if body is None else body
        return self.run(self.table.insert, NewRow(kind, message.message_id, "mail", "mail", encoded), owner, due=due)

    def execute(self, sql, **params):
        return self.outbox.database.run(lambda connection: connection.execute(sql, **params))

    def end_leases(self):
        self.execute("UPDATE dramatiq_policies_outbox SET due_at = 0")

    def queued(self):
        return [dramatiq.Message.decode(body).args[0] for body in self.broker.queues["mail"].queue]

    def rows(self):
        return self.run(self.outbox.rows.list)


@pytest.fixture
def office(tmp_path):
    office = Office(tmp_path)
    yield office
    office.outbox.database.close()
    office.engine.dispose()
