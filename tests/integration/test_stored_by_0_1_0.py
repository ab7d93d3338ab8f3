"""Bytes that version 0.1.0 left on Redis and RabbitMQ are read by the code of today.

``stored_by_0_1_0.json`` holds the bytes, each as a text in Latin-1. Workers of 0.1.0 wrote them with Dramatiq 2.2.1, started
by ``dramatiq shop``, on a Redis server of their own and in a queue of RabbitMQ. ``charge`` has the key
``"charge:{order_id}"``, ``ConnectionError: RetryPolicy(attempts=5, wait=constant(40_000))``, ``max_retries=0`` and tags:

- ``charge(1)`` has succeeded, and ``charge(2)`` with the message id ``order-2``. A delayed ``charge(7)`` waits.
- ``charge(3)`` waits for its retry, ``charge(5)`` has snoozed, ``invoice(10)`` waits for a retry by Dramatiq's ``max_retries``.
- ``charge(4)`` is a dead letter. ``charge(11)`` was one, and the command has replayed it.
- ``charge(8)`` ran when SIGKILL ended its worker. On Redis it came back and ran, and a second SIGKILL followed. A duplicate
  of it was deferred.
- ``pick("b")``, one of a group of two, ran when its worker was killed. The other member has succeeded.
- ``charge(12)`` has not been taken. ``charge(14)`` is due in ten years.
- The worker of ``refund(9)`` ended between the two commands that made a dead letter.
- RabbitMQ: the worker of ``charge(13)`` ended before the publish of the retry, whose record was written.

Only names are replaced: of the namespace, the queue, the group and the host.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pika
import pytest
import redis
from dramatiq import Message
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend

from dramatiq_policies import Idempotency, RetryPolicy, Snooze, constant
from dramatiq_policies.ops.dead_letters.commands import dead_letters, replay
from dramatiq_policies.stores.redis import RedisStore

from .places import App, Place, RabbitmqPlace, RedisPlace, until

TEXT = Path(__file__).with_name("stored_by_0_1_0.json").read_text()
HOUR = 3_600_000
GROUP = "3bb604c5-7fdf-4958-bfe2-0e60adc77dc7"
#: RabbitMQ, with a RedisStore whose namespace is the default: today the names of its keys differ from those of 0.1.0.
DERIVED = "rabbitmq, derived names"
QUEUE = "dp-test-0-1-0"


class Declined(Exception):
    pass


class Shop:
    """The application of today, with the actors of the application that wrote the bytes."""

    def __init__(self, broker: Any, place: Place, **bundle: Any) -> None:
        self.app = App(place, broker, **bundle)
        self.runs: list[tuple[Any, ...]] = []
        #: The messages of 0.1.0.
        self.seen: list[Message[Any]] = []
        #: The messages that wait after the worker of today.
        self.left: list[Message[Any]] = []
        actor = self.app.actor

        @actor(
            actor_name="charge",
            idempotency_key="charge:{order_id}",
            retry_on={ConnectionError: RetryPolicy(attempts=5, wait=constant(HOUR))},
            max_retries=0,
            tags={"team": "billing"},
        )
        def charge(order_id: int, how: str = "ok") -> None:
            self.run("charge", order_id, how)

        @dramatiq.actor(actor_name="refund", queue_name="refunds", broker=broker, max_retries=0)
        def refund(order_id: int, how: str) -> None:
            self.run("refund", order_id, how)

        @actor(actor_name="pick", max_retries=0)
        def pick(item: str, how: str = "ok") -> None:
            self.run("pick", item, how)

        @actor(actor_name="ship", max_retries=0)
        def ship() -> None:
            self.run("ship", None, "ok")

        @actor(actor_name="invoice", max_retries=3, min_backoff=HOUR, max_backoff=HOUR)
        def invoice(order_id: int) -> None:
            self.run("invoice", order_id, "die")

        self.charge = charge

    def run(self, actor: str, number: Any, how: str) -> None:
        self.runs.append((actor, number))
        if how == "retry":
            raise ConnectionError("no route to the gateway")
        if how == "die":
            raise Declined("card declined")
        if how == "snooze":
            raise Snooze(HOUR)

    def work(self, endings: int, condition: Callable[[], Any] = lambda: True) -> None:
        """Run a worker and two duplicates of completed jobs, until so many deliveries have ended."""
        with self.app.working():
            self.charge.send(1)
            self.charge.send(2)
            until(lambda: len(self.endings) >= endings and condition(), describe=lambda: self.app.events)

    @property
    def endings(self) -> list[Any]:
        """The published outcomes, except of duplicates that only wait for a run."""
        return [event for event in self.app.events if event.reason != "running"]

    def ended(self, actor: str, number: Any) -> list[tuple[str, str | None, int]]:
        """How the deliveries of a job ended: the outcome, the reason, the attempt."""
        jobs = [one.message_id for one in self.seen if one.actor_name == actor and [*one.args[:1]] == [number]]
        found = [event for event in self.endings if event.message_id in jobs]
        return [(event.outcome.value, event.reason, event.attempt) for event in found]

    @property
    def ids(self) -> set[str]:
        """The ids of the messages of 0.1.0."""
        return {message.message_id for message in self.seen}

    def message(self, number: Any, messages: Iterable[Message[Any]]) -> Message[Any]:
        """The message of an order among messages."""
        (found,) = (message for message in messages if message.args[0] == number)
        return found


def restored(client: redis.Redis, names: dict[str, str], kept: dict[str, Any], later: int) -> list[Message[Any]]:
    """Write the keys of a snapshot, as they are a time later. Returns the messages in them."""
    found = []
    moved = int(time.time() * 1_000) - kept["taken_at"]

    def encoded(text: str) -> bytes:
        return text.encode("latin-1")

    for written, kind, left, value in kept["keys"]:
        prefix = next((one for one in names if written.startswith(one)), "")
        name = encoded(names.get(prefix, "") + written.removeprefix(prefix))
        if kind == "string":
            client.set(name, encoded(value))
        elif kind == "list":
            client.rpush(name, *map(encoded, value))
        elif kind == "set":
            client.sadd(name, *map(encoded, value))
        elif kind == "zset":
            # A dead letter expires by its score, and a worker is dead by the age of its own.
            age = moved if written.endswith(".XQ") else 0
            client.zadd(name, {encoded(member): score + age for member, score in value})
        else:
            client.hset(name, mapping={encoded(field): encoded(body) for field, body in value.items()})
            found += [Message.decode(encoded(body)) for body in value.values()]
        if left > 0:
            client.pexpire(name, max(1, left - later))
    return found


@contextlib.contextmanager
def on_redis(url: str, later: int) -> Iterator[Shop]:
    """The snapshot of Redis in a namespace of its own, and the application on it."""
    namespace, group = f"dp-test-{uuid.uuid4().hex}", str(uuid.uuid4())
    kept = json.loads(TEXT.replace(GROUP, group).replace("vm:", "elsewhere:"))["redis"]
    with redis.Redis.from_url(url) as client:
        names = {"dramatiq:": f"{namespace}:", "idem:": f"{namespace}:idem:"}
        seen = restored(client, names, kept, later)
        place = RedisPlace(url, "orders", namespace, client)
        broker = RedisBroker(url=url, namespace=namespace, heartbeat_timeout=300)
        broker.add_middleware(GroupCallbacks(RedisBackend(client=client)))
        shop = Shop(broker, place)
        shop.seen = seen
        try:
            yield shop
        finally:
            broker.close()
            client.delete(*client.scan_iter(match=f"{namespace}:*", count=5_000), group, f"{{{group}}}@members")


@contextlib.contextmanager
def on_rabbitmq(url: str, redis_url: str, *, derived: bool) -> Iterator[Shop]:
    """The snapshot of RabbitMQ in a queue of its own, its records on Redis, and the application on both."""
    queue, namespace = f"dp-test-{uuid.uuid4().hex}", f"dp-test-{uuid.uuid4().hex}"
    kept = json.loads(TEXT.replace(QUEUE, queue).replace("vm:", "elsewhere:"))["rabbitmq"]
    place = RabbitmqPlace(url, queue)
    with redis.Redis.from_url(redis_url) as client:
        restored(client, {"idem:": f"{namespace}:"}, kept, HOUR)
        seen = []
        for name, durable, arguments in kept["declared"]:
            place.channel.queue_declare(name, durable=durable, arguments=arguments)
        for name, messages in kept["messages"].items():
            for body, properties in messages:
                place.channel.basic_publish("", name, body.encode("latin-1"), pika.BasicProperties(**properties))
                seen.append(Message.decode(body.encode("latin-1")))
        store = RedisStore(client) if derived else RedisStore(client, namespace=namespace)
        store.namespace = namespace
        broker = RabbitmqBroker(url=url, confirm_delivery=True)
        shop = Shop(broker, place, idempotency=Idempotency(store))
        shop.seen = seen
        try:
            yield shop
        finally:
            broker.close()
            for name in ("", ".DQ", ".XQ"):
                place.channel.queue_delete(queue + name)
            place.close()
            client.delete(*client.scan_iter(match=f"{namespace}:*", count=5_000))


@pytest.fixture(scope="module")
def shops(redis_url: str, rabbitmq_url: str) -> Iterator[Callable[[str], Shop]]:
    """A snapshot an hour later, after a worker of today; each is made once."""
    made: dict[str, Shop] = {}
    with contextlib.ExitStack() as stack:
        patched = stack.enter_context(pytest.MonkeyPatch.context())
        patched.setattr("dramatiq_policies.brokers.redis.recovery._CHECK_EVERY", 0.05)

        def shop(kind: str) -> Shop:
            if kind in made:
                return made[kind]
            if kind == "redis":
                found = stack.enter_context(on_redis(redis_url, HOUR))
                found.work(12, lambda: found.app.place.dead("refunds"))
            else:
                found = stack.enter_context(on_rabbitmq(rabbitmq_url, redis_url, derived=kind == DERIVED))
                found.work(8)
            found.left = found.app.place.left()
            made[kind] = found
            return found

        yield shop


@pytest.fixture(params=["redis", "rabbitmq", DERIVED])
def shop(request: pytest.FixtureRequest, shops: Callable[[str], Shop]) -> Shop:
    return shops(request.param)


@pytest.fixture(params=["rabbitmq", DERIVED])
def rabbitmq_shop(request: pytest.FixtureRequest, shops: Callable[[str], Shop]) -> Shop:
    return shops(request.param)


@pytest.fixture
def redis_shop(shops: Callable[[str], Shop]) -> Shop:
    return shops("redis")


# ---------------------------------------------------------------------- both brokers


def test_a_job_that_was_completed_has_only_duplicates(shop: Shop) -> None:
    duplicates = [event for event in shop.endings if event.reason == "completed" and event.message_id not in shop.ids]
    assert [event.outcome.value for event in duplicates] == ["duplicate", "duplicate"]
    assert not {("charge", 1), ("charge", 2)} & set(shop.runs)
    assert Idempotency.state(shop.charge, 1).state == "completed"
    assert Idempotency.state(shop.charge, 2).message_id == "order-2"


def test_a_retry_goes_on_with_the_attempts_of_its_rule(shop: Shop) -> None:
    assert shop.ended("charge", 3) == [("retried", None, 2)]
    options = shop.message(3, shop.left).options
    assert options["policies"]["runs"]["builtins.ConnectionError"][0] == 2
    assert [one["attempt"] for one in options["policies"]["history"]] == [1, 2]
    assert Idempotency.state(shop.charge, 3).state == "waiting"


def test_a_retry_by_max_retries_goes_on_with_the_attempts_of_dramatiq(shop: Shop) -> None:
    assert shop.ended("invoice", 10) == [("retried", None, 2)]
    assert shop.message(10, shop.left).options["retries"] == 2


def test_a_job_that_had_snoozed_snoozes_once_more(shop: Shop) -> None:
    assert shop.ended("charge", 5) == [("deferred", "snoozed", 1)]
    before, after = (shop.message(5, some).options["policies"] for some in (shop.seen, shop.left))
    assert (before["snoozes"], after["snoozes"]) == (1, 2)
    assert before["snoozed_since"] == after["snoozed_since"]


def test_a_job_whose_worker_was_killed_runs_again_once(shop: Shop) -> None:
    assert shop.runs.count(("charge", 8)) == 1
    assert Idempotency.state(shop.charge, 8).state == "completed"


def test_a_dead_letter_is_listed_with_its_failure_and_replayed(shop: Shop) -> None:
    (letter,) = (one for one in dead_letters(shop.app.broker) if one.message is not None and one.message.args[0] == 4)
    assert (letter.actor, letter.outcome, letter.reason, letter.attempts) == ("charge", "dead", "unclassified", 1)
    assert (letter.exception, letter.text, letter.tags) == ("shop.Declined", "card declined", {"team": "billing"})
    assert letter.traceback is not None
    assert letter.traceback.endswith("Declined: card declined\n")
    assert len(letter.history) == 1
    before = len(shop.app.events)
    assert replay(shop.app.broker, [letter.queue], lambda one: one.message_id == letter.message_id).count == 1
    with shop.app.working():
        until(lambda: len(shop.app.events) > before)
    assert shop.ended("charge", 4) == [("dead", "unclassified", 1)]


# ---------------------------------------------------------------------- RabbitMQ


def test_the_retry_of_a_worker_that_died_before_its_publish_is_published(rabbitmq_shop: Shop) -> None:
    assert rabbitmq_shop.ended("charge", 13) == [("duplicate", "stale", 1), ("retried", None, 2)]
    assert rabbitmq_shop.runs.count(("charge", 13)) == 1
    rule = rabbitmq_shop.message(13, rabbitmq_shop.left).options["policies"]["runs"]["builtins.ConnectionError"]
    assert rule[0] == 2


# ---------------------------------------------------------------------- Redis


def test_ready_delayed_and_replayed_messages_run(redis_shop: Shop) -> None:
    assert redis_shop.ended("charge", 12) == [("succeeded", None, 1)]
    assert redis_shop.ended("charge", 7) == [("succeeded", None, 1)]
    assert redis_shop.ended("charge", 11) == [("dead", "unclassified", 1)]
    letter = redis_shop.message(11, redis_shop.app.place.dead())
    assert letter.options["policies"] == {"replays": 1}


def test_a_message_that_is_due_later_waits(redis_shop: Shop) -> None:
    before, after = (redis_shop.message(14, some) for some in (redis_shop.seen, redis_shop.left))
    assert after.options["eta"] == before.options["eta"]
    assert redis_shop.ended("charge", 14) == []


def test_a_duplicate_that_waited_for_the_run_ends_with_it(redis_shop: Shop) -> None:
    assert sorted(redis_shop.ended("charge", 8)) == [("duplicate", "completed", 1), ("succeeded", None, 1)]


def test_a_group_whose_worker_was_killed_calls_back_once(redis_shop: Shop) -> None:
    assert redis_shop.ended("pick", "b") == [("succeeded", None, 1)]
    assert redis_shop.runs.count(("ship", None)) == 1


def test_a_half_moved_dead_letter_is_moved_and_not_run(redis_shop: Shop) -> None:
    (letter,) = redis_shop.app.place.dead("refunds")
    assert letter.options["failure"]["message"] == "card declined"
    assert redis_shop.ended("refund", 9) == []
    assert redis_shop.app.place.left("refunds") == []


def test_the_dead_workers_hold_nothing_any_more(redis_shop: Shop) -> None:
    place = redis_shop.app.place
    assert isinstance(place, RedisPlace)
    assert "__acks__" in TEXT
    assert list(place.client.scan_iter(match=place.key("__acks__.*"), count=5_000)) == []


@pytest.mark.parametrize("later", [0, HOUR], ids=["while its lease lasts", "when its lease is over"])
def test_the_records_of_keys_are_shown_and_forgotten(redis_url: str, later: int) -> None:
    with on_redis(redis_url, later) as shop:
        found = {number: Idempotency.state(shop.charge, number) for number in (1, 2, 3, 4, 5, 8, 99)}
        states = {number: one.state for number, one in found.items()}
        waits = "none" if later else "waiting"
        assert states == {1: "completed", 2: "completed", 3: waits, 4: "none", 5: waits, 8: "running", 99: "none"}
        assert found[2].message_id == "order-2"
        assert found[8].owner is not None
        assert found[8].owner.startswith("elsewhere:")
        assert found[8].starts == 2
        assert (found[8].left_ms == 0) == (later > 0)
        assert Idempotency.forget(shop.charge, 1)
        assert Idempotency.state(shop.charge, 1).state == "none"


def test_a_duplicate_waits_while_the_lease_of_a_worker_of_0_1_0_lasts(redis_url: str) -> None:
    with on_redis(redis_url, 0) as shop:
        with shop.app.working():
            again = shop.charge.send(8)
            until(lambda: any(event.message_id == again.message_id for event in shop.app.events))
        (event,) = (event for event in shop.app.events if event.message_id == again.message_id)
        assert (event.outcome.value, event.reason) == ("deferred", "running")
        assert ("charge", 8) not in shop.runs
