"""RabbitMQ: queues that are deleted under a worker, and quorum queues that count returns."""

from __future__ import annotations

from typing import Any

import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from dramatiq_policies import RetryPolicy, constant, current_job
from dramatiq_policies.delivery.broker_state import state_of

from .places import App, Gate, RabbitmqPlace, until

pytestmark = pytest.mark.usefixtures("quick_restarts")


class Transient(Exception):
    pass


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed before the job ends", "not noticed"])
@pytest.mark.parametrize("ending", ["retried", "dead"])
def test_a_follow_up_message_is_published_although_its_queue_was_deleted_meanwhile(
    rabbitmq_place: RabbitmqPlace, noticed: bool, ending: str
) -> None:
    app, gate = rabbitmq_place.app(), Gate()

    @app.actor(retry_on={Transient: RetryPolicy(attempts=2 if ending == "retried" else 1, wait=constant(10))})
    def job(n: int) -> None:
        if current_job().attempt == 1:
            gate()
            raise Transient

    job.send(1)
    with app.working(threads=1) as worker:
        assert gate.entered.wait(30)
        before: Any = worker.consumers[rabbitmq_place.queue].consumer
        rabbitmq_place.channel.queue_delete(rabbitmq_place.queue)
        if noticed:
            until(lambda: worker.consumers[rabbitmq_place.queue].consumer not in (None, before))
        gate.open.set()
        app.wait_for(*(["retried", "succeeded"] if ending == "retried" else ["dead"]))
        until(lambda: not app.in_hand())
        # The consumer has declared the queue again.
        until(lambda: worker.consumers[rabbitmq_place.queue].consumer not in (None, before))
    assert app.outcomes == (["retried", "succeeded"] if ending == "retried" else ["dead"])
    assert len(rabbitmq_place.dead()) == (0 if ending == "retried" else 1)
    assert rabbitmq_place.left() == []


class QuorumBroker(RabbitmqBroker):
    """Declares quorum queues, which count how often a message is returned."""

    limit = 3

    def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:
        arguments = super()._build_queue_arguments(queue_name)
        return {**arguments, "x-queue-type": "quorum", "x-delivery-limit": self.limit}


@pytest.mark.parametrize("limit", [2, 3])
def test_a_message_that_workers_hold_and_return_again_and_again_is_not_counted_out(
    rabbitmq_place: RabbitmqPlace, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(QuorumBroker, "limit", limit)

    def make() -> tuple[App, Any]:
        app = rabbitmq_place.app(broker=quorum(rabbitmq_place))

        @app.actor()
        def job(n: int) -> None:
            pass

        return app, job

    app, job = make()
    for n in range(5):
        job.send_with_options(args=(n,), delay=3_600_000)
    for _ in range(2 * limit + 2):
        app, job = make()
        with app.working(threads=1):
            until(lambda app=app: app.in_hand() == 5)  # type: ignore[misc]
    assert rabbitmq_place.dead() == []
    assert sorted(message.args[0] for message in rabbitmq_place.left()) == list(range(5))


def test_many_messages_are_published_anew_in_batches(rabbitmq_place: RabbitmqPlace) -> None:
    app = rabbitmq_place.app(broker=quorum(rabbitmq_place))

    @app.actor()
    def job(n: int) -> None:
        pass

    for n in range(250):
        job.send_with_options(args=(n,), delay=3_600_000)
    for _ in range(7):
        with app.working(threads=1):
            until(lambda: app.in_hand() == 250)
    assert rabbitmq_place.dead() == []
    assert sorted(message.args[0] for message in rabbitmq_place.left()) == list(range(250))


def quorum(place: RabbitmqPlace) -> QuorumBroker:
    broker = QuorumBroker(url=place.url)
    place._brokers.append(broker)
    return broker


def test_a_message_that_is_returned_before_it_runs_is_not_counted_out_and_still_says_that_it_came_back(
    rabbitmq_place: RabbitmqPlace,
) -> None:
    app = rabbitmq_place.app(broker=quorum(rabbitmq_place))
    redelivered = []

    @app.actor(max_retries=0)
    def job(n: int) -> None:
        redelivered.append(n)

    job.send(7)
    for _ in range(6):
        consumer = app.broker.consume(rabbitmq_place.queue, prefetch=1, timeout=100)
        message = until(lambda consumer=consumer: next(consumer))  # type: ignore[misc]
        assert message.args == (7,)
        last = message.delivery.redelivered
        # As by a worker that stops before it runs the message.
        state_of(app.broker).stopping.set()
        consumer.close()
        state_of(app.broker).stopping.clear()
    assert last
    app.work_until("succeeded")
    assert rabbitmq_place.dead() == []
    assert rabbitmq_place.left() == []
