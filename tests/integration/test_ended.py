"""A run that has ended without an acknowledgement is not repeated in its process: connections cut under running jobs."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import Counter
from typing import Any

import pytest
from dramatiq import pipeline
from dramatiq.brokers.redis import RedisBroker

from dramatiq_policies import RetryPolicy, Snooze, constant, current_job
from dramatiq_policies.brokers.ended_runs import EndedRuns
from dramatiq_policies.brokers.rabbitmq.acks import UnackedCounts
from dramatiq_policies.delivery.broker_state import state_of
from tests.proxy import Proxy, amqp_method

from .places import App, RabbitmqPlace, RedisPlace, until

pytestmark = pytest.mark.usefixtures("quick_restarts")


def hold_the_interpreter(seconds: float) -> None:
    """As an extension does that works without giving the GIL up."""
    ctypes.PyDLL(None).usleep(round(seconds * 1_000_000))


def ended_of(app: App) -> Any:
    return state_of(app.broker).shared(EndedRuns)


def all_acked(app: App) -> bool:
    """Whether the server waits for no ack of this worker's."""
    unacked_counts = state_of(app.broker).shared(UnackedCounts).by_queue
    return not app.in_hand() and not any(count() for count in unacked_counts.values())


def test_neither_a_job_that_holds_the_interpreter_past_two_heartbeats_nor_its_neighbours_run_again(
    rabbitmq_place: RabbitmqPlace,
) -> None:
    app = rabbitmq_place.app(f"{rabbitmq_place.url}?heartbeat=1")
    runs: Counter[str] = Counter()
    begun = threading.Barrier(4)

    @app.actor
    def hog() -> None:
        runs["hog"] += 1
        begun.wait(20)
        hold_the_interpreter(5)

    @app.actor
    def neighbour(name: str) -> None:
        runs[name] += 1
        begun.wait(20)

    @app.actor
    def waiting(name: str) -> None:
        runs[name] += 1

    hog.send()
    for number in range(3):
        neighbour.send(f"neighbour {number}")
    for number in range(4):
        waiting.send(f"waiting {number}")
    with app.working(threads=4):
        until(lambda: len(runs) == 8, 60, lambda: runs)
        # The server may have received some acks before it dropped the connection: those messages do not come again.
        until(lambda: Counter(app.outcomes)["duplicate"] and is_at_rest(app, rabbitmq_place), 60, lambda: app.outcomes)
    assert runs == dict.fromkeys(runs, 1)
    assert Counter(app.outcomes)["succeeded"] == 8
    assert rabbitmq_place.left() == rabbitmq_place.dead() == []


def is_at_rest(app: App, place: RabbitmqPlace) -> bool:
    """Whether nothing waits or is in hand, and nothing has ended for two seconds."""
    ended = len(app.outcomes)
    time.sleep(2)
    return len(app.outcomes) == ended and not app.in_hand() and place.ready() == 0


ENDINGS = {
    "succeeds": (["succeeded", "duplicate"], 1),
    "has a next stage": (["interrupted", "succeeded", "succeeded"], 1),
    "is retried": (["interrupted", "retried", "succeeded"], 2),
    "snoozes": (["interrupted", "deferred", "succeeded"], 2),
    "is dead": (["interrupted", "dead"], 1),
    "is discarded": (["interrupted", "discarded"], 1),
}


@pytest.mark.parametrize("comes_again", ["while it runs", "after its end"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_whose_connection_is_lost_ends_once_and_all_that_follows_from_it_happens_once(
    rabbitmq_place: RabbitmqPlace, ending: str, comes_again: str
) -> None:
    with Proxy.before(rabbitmq_place.url) as proxy:
        app = rabbitmq_place.app(proxy.url)
        runs: Counter[str] = Counter()
        begun, gate = threading.Event(), threading.Event()

        @app.actor(
            retry_on={OSError: RetryPolicy(attempts=3, wait=constant(50))},
            alert_on=(),
            discard_on=ZeroDivisionError,
            max_retries=0,
        )
        def job() -> str:
            runs["job"] += 1
            begun.set()
            assert gate.wait(30)
            if current_job().attempt == 1 and runs["job"] == 1:
                if ending == "is retried":
                    raise OSError("the first time")
                if ending == "snoozes":
                    raise Snooze(50)
                if ending == "is dead":
                    raise KeyError("no rule")
                if ending == "is discarded":
                    raise ZeroDivisionError
            return "result"

        @app.actor
        def following(result: str) -> None:
            runs[f"following {result}"] += 1

        if ending == "has a next stage":
            pipeline([job.message(), following.message()]).run()
        else:
            job.send()
        outcomes, times = ENDINGS[ending]
        with app.working(threads=2):
            assert begun.wait(20)
            if comes_again == "after its end":
                proxy.refuse()
            proxy.cut()
            if comes_again == "while it runs":
                until(lambda: ended_of(app)._waiting)
                gate.set()
            else:
                transport = next(iter(ended_of(app).in_hand.values()))
                until(transport.is_revoked)
                gate.set()
                until(lambda: ended_of(app).known)
                proxy.accept()
            until(lambda: len(app.outcomes) >= len(outcomes) and all_acked(app), 30, lambda: app.events)
        assert sorted(app.outcomes) == sorted(outcomes)
        assert runs["job"] == times
        assert runs["following result"] == (ending == "has a next stage")
    assert rabbitmq_place.left() == []
    assert len(rabbitmq_place.dead()) == (ending == "is dead")
    assert not ended_of(app).in_hand
    assert not ended_of(app).known


@pytest.mark.parametrize("ending", ["succeeds", "is retried", "is dead"])
def test_a_run_whose_ack_is_lost_on_its_way_does_not_run_here_again(rabbitmq_place: RabbitmqPlace, ending: str) -> None:
    """The ack was written to a connection that the server had closed already."""
    with Proxy.before(rabbitmq_place.url) as proxy:
        app = rabbitmq_place.app(proxy.url)
        runs: Counter[int] = Counter()
        gate = threading.Event()

        @app.actor(retry_on={OSError: RetryPolicy(attempts=3, wait=constant(50))}, max_retries=0)
        def job() -> None:
            runs[current_job().attempt] += 1
            assert gate.wait(30)
            if current_job().attempt == 1 and ending == "is retried":
                raise OSError
            if ending == "is dead":
                raise KeyError

        # The follow-up message goes over another connection, at once.
        with app.working(threads=1):
            job.send()
            until(lambda: runs)
            lost = proxy.cut_when(amqp_method(60, 80))
            gate.set()
            assert lost.wait(20)
            until(lambda: "duplicate" in app.outcomes and all_acked(app), 30, lambda: app.events)
        assert set(runs.values()) == {1}
    assert rabbitmq_place.left() == []
    assert len(rabbitmq_place.dead()) == (ending == "is dead")


def test_two_messages_alike_both_run_although_one_connection_is_lost(rabbitmq_place: RabbitmqPlace) -> None:
    with Proxy.before(rabbitmq_place.url) as proxy:
        app = rabbitmq_place.app(proxy.url)
        runs: list[int] = []
        gate = threading.Event()

        @app.actor
        def job() -> None:
            runs.append(1)
            assert gate.wait(30)

        body = job.message().encode()
        app.broker.declare_queue(rabbitmq_place.queue, ensure=True)
        rabbitmq_place.push(body, body)
        with app.working(threads=1):
            until(lambda: runs)
            proxy.cut()
            until(lambda: ended_of(app)._waiting)
            gate.set()
            until(lambda: len(app.events) >= 2 and not app.place.ready() and all_acked(app), 30, lambda: app.events)
        assert len(runs) >= 2
    assert rabbitmq_place.left() == []


# Redis: a worker that was silent for its heartbeat_timeout.


@pytest.mark.parametrize("ending", ["succeeds", "is retried", "is dead"])
def test_a_reassigned_message_that_comes_back_does_not_run_in_the_same_process_again(
    redis_place: RedisPlace, ending: str
) -> None:
    broker = RedisBroker(url=redis_place.url, namespace=redis_place.namespace)
    app = redis_place.app(broker=broker)
    runs: Counter[int] = Counter()
    begun, gate = threading.Event(), threading.Event()

    @app.actor(retry_on={OSError: RetryPolicy(attempts=3, wait=constant(50))}, max_retries=0)
    def job() -> None:
        runs[current_job().attempt] += 1
        begun.set()
        assert gate.wait(30)
        if current_job().attempt == 1 and ending == "is retried":
            raise OSError
        if ending == "is dead":
            raise KeyError

    job.send()
    client, key = redis_place.client, redis_place.key
    with app.working(threads=1):
        assert begun.wait(20)
        # Another worker takes what this one holds, and holds it until the run has ended.
        (redis_id,) = client.smembers(key(f"__acks__.{broker.broker_id}.{redis_place.queue}"))
        client.srem(key(f"__acks__.{broker.broker_id}.{redis_place.queue}"), redis_id)
        gate.set()
        until(lambda: ended_of(app).known, 20, lambda: app.events)
        client.rpush(key(redis_place.queue), redis_id)
        until(lambda: not ended_of(app).known, 20)
        expected = {"succeeds": ["duplicate"], "is retried": ["duplicate", "succeeded"], "is dead": ["dead", "dead"]}[
            ending
        ]
        until(
            lambda: not [one for one in expected if one not in app.outcomes] and not app.in_hand(),
            20,
            lambda: app.events,
        )
    assert set(runs.values()) == {1}
    assert len(runs) == (2 if ending == "is retried" else 1)
    assert redis_place.left() == []
    assert len(redis_place.dead()) == (ending == "is dead")
