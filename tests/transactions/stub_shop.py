"""An application with an outbox on a StubBroker, for the tests of each outbox."""

from __future__ import annotations

import dramatiq
from dramatiq import Message
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import Middleware

from dramatiq_policies import install


class Hooks(Middleware):
    """Notes the messages about to be enqueued, and those that were."""

    def __init__(self):
        self.before, self.after = [], []

    def before_enqueue(self, broker, message, delay):
        message.options["caller"] = "known"
        self.before.append((message.message_id, delay))

    def after_enqueue(self, broker, message, delay):
        self.after.append((message.message_id, delay, message.options["caller"]))


class StubShop:
    """Two actors: one with the outbox and one without."""

    def __init__(self, outbox, *middleware):
        self.outbox = outbox
        self.hooks = Hooks()
        self.broker = StubBroker()
        for one in (self.hooks, *middleware):
            self.broker.add_middleware(one)
        install(self.broker, outbox=outbox)
        self.confirm = dramatiq.actor(self.do, broker=self.broker, actor_name="confirm", queue_name="mail")
        self.at_once = dramatiq.actor(
            self.do, broker=self.broker, actor_name="at_once", queue_name="mail", outbox=False
        )
        self.done = []

    def do(self, *args):
        self.done.append(args)

    def queued(self, queue="mail"):
        return [Message.decode(body).args for body in self.broker.queues[queue].queue]

    def pending(self):
        return self.outbox.database.run(self.outbox.rows.stats).pending
