"""A completion goes out with the claim of the next job; what must not change by that."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq import Worker

from dramatiq_policies import ErrorClassifier, Idempotency, install
from dramatiq_policies._redis import CommandBatcher
from dramatiq_policies.brokers.redis import delay_index
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.idempotency.batched_completion import BatchedCompletions
from dramatiq_policies.stores.redis import RedisStore

from .places import Gate, Place, RedisPlace, until

pytestmark = pytest.mark.usefixtures("quick_restarts", "all_in_hand")


class Shop:
    """A broker whose jobs have keys; all messages are sent before its first job ends, so that each thread has more to do."""

    def __init__(self, place: Place, store: RedisStore, middleware: list[Any], **classifier: Any) -> None:
        self.place = place
        self.broker = place.broker()
        for one in middleware:
            self.broker.add_middleware(one)
        install(
            self.broker, error_classifier=ErrorClassifier(**classifier), idempotency=Idempotency(store, lease=5_000)
        )
        self.told: list[str] = []
        state = state_of(self.broker)
        state.outcomes.success_listeners = (
            *state.outcomes.success_listeners,
            lambda delivery: self.told.append(delivery.message.message_id),
        )
        self.ran: list[int] = []
        self.gate = Gate()
        self.sent: list[dramatiq.Message[Any]] = []

        @dramatiq.actor(broker=self.broker, queue_name=place.queue, actor_name="opener")
        def opener() -> None:
            self.gate()

        self.opening = opener.send()

    def actor(self, **options: Any) -> Callable[[Any], Any]:
        return dramatiq.actor(broker=self.broker, queue_name=self.place.queue, **options)

    def send(self, actor: Any, *args: Any) -> None:
        self.sent.append(actor.send(*args))

    def send_jobs(self, count: int) -> Any:
        """The actor of so many jobs with a key each, all sent."""

        @self.actor(idempotency_key="{number}")
        def job(number: int) -> None:
            self.ran.append(number)

        for number in range(count):
            self.send(job, number)
        return job

    @contextlib.contextmanager
    def working(self, threads: int = 1) -> Iterator[Worker]:
        """Work on what was sent; a single thread begins once all of it is in the worker's hands."""

        worker = Worker(self.broker, worker_timeout=100, worker_threads=threads)
        worker.start()
        try:
            self.gate.entered.wait(10)
            until(lambda: threads > 1 or worker.work_queue.qsize() >= len(self.sent))
            self.gate.open.set()
            yield worker
        finally:
            worker.stop(10_000)
        with contextlib.suppress(ValueError):
            self.told.remove(self.opening.message_id)

    def work_until_all_are_done(self, threads: int = 1) -> None:
        with self.working(threads):
            until(lambda: len(self.told) >= len(self.sent) + 1, describe=lambda: self.told)
        assert sorted(self.told) == sorted(message.message_id for message in self.sent)
        assert self.place.left() == []


@pytest.fixture
def all_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dramatiq.worker.QUEUE_PREFETCH", 64)


@pytest.fixture
def make_shop(place: Place, redis_url: str, redis_namespace: str) -> Callable[..., Shop]:
    def make(*middleware: Any, **classifier: Any) -> Shop:
        # On Redis, too, a store of its own: what its completions share with acks is seen below.
        store = RedisStore.from_url(redis_url, namespace=f"{redis_namespace}:idem")
        return Shop(place, store, list(middleware), **classifier)

    return make


@pytest.fixture
def batcher(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of each round trip, without those of the consumer of a delay queue."""
    seen: list[list[str]] = []
    stock = CommandBatcher._exchange

    def watched(self: CommandBatcher, calls: list[Any]) -> None:
        if commands := [str(call.command[0]) for call in calls if delay_index._SCRIPT.digest not in call.command]:
            seen.append(commands)
        stock(self, calls)

    monkeypatch.setattr(CommandBatcher, "_exchange", watched)
    return seen


def state(actor: Any, number: int) -> str:
    return Idempotency.state(actor, number).state


def test_a_thread_with_more_to_do_waits_once_for_each_job(make_shop: Callable[..., Shop], batcher: list[Any]) -> None:
    shop = make_shop()
    job = shop.send_jobs(12)
    shop.work_until_all_are_done()
    with_claims = [trip for trip in batcher if len(trip) == 2]
    assert len(with_claims) == 11, batcher  # The first has nothing to carry, and the last has nobody to go with.
    assert all(state(job, number) == "completed" for number in range(12))


@pytest.mark.parametrize("used", [True, False], ids=["0.1.0 used the store", "a new store"])
def test_a_completion_that_goes_out_with_a_claim_tells_other_processes_the_arguments(
    place: Place,
    redis_url: str,
    redis_namespace: str,
    redis_client: redis.Redis,
    batcher: list[Any],
    caplog: pytest.LogCaptureFixture,
    used: bool,
) -> None:
    namespace = f"{redis_namespace}:idem"
    if used:
        redis_client.set(f"{namespace}:a key", "of 0.1.0", px=60_000)

    def shop_with_charge() -> tuple[Shop, Any]:
        """A shop as another process has it: it remembers no arguments."""
        shop = Shop(place, RedisStore.from_url(redis_url, namespace=namespace), [])

        # The key leaves the amount out.
        @shop.actor(idempotency_key="{order}", actor_name="charge")
        def charge(order: int, amount: int) -> None:
            shop.ran.append(order)

        return shop, charge

    first, charge = shop_with_charge()
    for order in range(12):
        first.send(charge, order, 10)
    first.work_until_all_are_done()
    assert len([trip for trip in batcher if len(trip) == 2]) >= 11, batcher
    # Each completed key with its arguments, which 0.1.0 would not read: then in a companion.
    values = [redis_client.get(name) for name in redis_client.scan_iter(match=f"{namespace}:*", count=5_000)]
    assert sorted(len(value) for value in values if value[:2] == b"\x01C") == [18] * 12 * used + [22] * 12

    second, charge = shop_with_charge()
    for order in range(12):
        second.send(charge, order, 99 if order == 7 else 10)
    with second.working():
        until(lambda: second.place.ready() == 0 and second.broker.join(place.queue) is None)
    assert second.ran == []
    assert sum("but other arguments" in record.getMessage() for record in caplog.records) == 1


def test_the_threads_of_a_worker_carry_for_one_another(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    job = shop.send_jobs(50)
    shop.work_until_all_are_done(threads=4)
    assert sorted(shop.ran) == list(range(50))
    assert all(state(job, number) == "completed" for number in range(50))


@pytest.mark.parametrize("following", ["with a key", "without a key", "whose key is the user's code"])
def test_no_job_begins_before_the_last_one_of_its_thread_is_remembered(
    make_shop: Callable[..., Shop], following: str
) -> None:
    shop = make_shop()
    found = []

    def look() -> None:
        found.append(state(first, 1))

    def key(number: int) -> int:
        look()
        return number

    options: dict[str, Any] = {
        "with a key": {"idempotency_key": "{number}"},
        "without a key": {},
        "whose key is the user's code": {"idempotency_key": key},
    }[following]

    @shop.actor(idempotency_key="{number}")
    def first(number: int) -> None: ...

    @shop.actor(**options)
    def second(number: int) -> None:
        look()

    shop.send(first, 1)
    shop.send(second, 2)
    shop.work_until_all_are_done()
    assert found
    assert set(found) == {"completed"}


def test_a_worker_that_stops_with_prefetched_messages_sends_its_posted_completions(
    make_shop: Callable[..., Shop],
) -> None:
    shop = make_shop()
    ran = []

    @shop.actor(idempotency_key="{number}")
    def job(number: int) -> None:
        ran.append(number)
        if number == 1:
            # Ends its thread when this job is over, while others wait.
            for thread in worker.workers:
                thread.stop()

    for number in range(4):
        shop.send(job, number)
    with shop.working() as worker:
        until(lambda: len(shop.told) == 3, describe=lambda: shop.told)
    assert ran == [0, 1]
    assert [state(job, number) for number in range(4)] == ["completed", "completed", "none", "none"]
    assert sorted(message.args[0] for message in shop.place.left()) == [2, 3]


def test_a_thread_stopped_between_two_jobs_sends_its_posted_completion(
    make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = make_shop()
    job = shop.send_jobs(4)
    look = BatchedCompletions.flush_if_idle

    def look_and_be_stopped(batched_completions: BatchedCompletions) -> None:
        look(batched_completions)
        if batched_completions.batcher.posted:
            for thread in worker.workers:
                thread.stop()

    monkeypatch.setattr(BatchedCompletions, "flush_if_idle", look_and_be_stopped)
    with shop.working() as worker:
        until(lambda: shop.ran and not any(thread.is_alive() for thread in worker.workers))
        assert shop.ran == [0]
        assert state(job, 0) == "completed"


def test_a_paused_worker_is_given_nothing_to_carry(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()

    @shop.actor(idempotency_key="{number}")
    def job(number: int) -> None:
        if number == 0:
            for thread in worker.workers:
                thread.pause()

    shop.send(job, 0)
    shop.send(job, 1)
    with shop.working() as worker:
        until(lambda: len(shop.told) == 2, describe=lambda: shop.told)
        assert state(job, 0) == "completed"
        for thread in worker.workers:
            thread.resume()
        until(lambda: len(shop.told) == 3, describe=lambda: shop.told)


def test_a_message_that_is_skipped_before_it_begins_leaves_nothing_posted(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()

    @shop.actor(idempotency_key="{number}")
    def job(number: int) -> None: ...

    @shop.actor(queue_timeout=1)
    def too_late() -> None:
        pytest.fail("it has expired")

    shop.send(job, 1)
    too_late.send()
    time.sleep(0.01)
    shop.sent.append(shop.sent[0])  # Two wait for the opener, of which one succeeds.
    with shop.working():
        until(lambda: len(shop.told) == 2, describe=lambda: shop.told)
        assert state(job, 1) == "completed"


def test_a_connection_that_is_lost_under_a_completion(
    make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows whether it was carried out: it is said again, and nothing runs or counts twice."""
    shop = make_shop()
    failed: list[bool] = []
    stock = CommandBatcher._exchange

    def failing(self: CommandBatcher, calls: list[Any]) -> None:
        stock(self, calls)
        if len(calls) == 2 and len(failed) < 3:
            failed.append(True)
            raise redis.ConnectionError("the answer was lost")

    monkeypatch.setattr(CommandBatcher, "_exchange", failing)
    shop.send_jobs(6)
    with shop.working():
        until(lambda: len(shop.told) >= 7, timeout=40, describe=lambda: shop.told)
    assert len(failed) == 3
    assert sorted(shop.ran) == list(range(6))
    assert len(set(shop.told)) == len(shop.told)
    assert shop.place.left() == []


@pytest.mark.parametrize("hook", ["before_process_message", "after_ack"])
def test_no_completion_is_posted_past_a_hook_of_the_users(
    make_shop: Callable[..., Shop], hook: str, batcher: list[Any]
) -> None:
    shop = make_shop(type("Own", (dramatiq.Middleware,), {hook: lambda self, *args: None})())
    shop.send_jobs(3)
    shop.work_until_all_are_done()
    assert {len(trip) for trip in batcher} == {1}


def test_a_listener_of_successes_is_called_on_the_thread_of_the_job(
    make_shop: Callable[..., Shop], batcher: list[Any]
) -> None:
    shop = make_shop(on_outcome=lambda event: None)
    shop.send_jobs(3)
    shop.work_until_all_are_done()
    assert {len(trip) for trip in batcher} == {1}


def test_a_completion_on_the_broker_s_redis_carries_the_ack(redis_place: RedisPlace, batcher: list[Any]) -> None:
    broker = redis_place.broker()
    store = RedisStore.beside(broker.client, namespace=f"{redis_place.namespace}:idem-{uuid.uuid4().hex}")
    shop = Shop(redis_place, store, [])
    shop.send_jobs(4)
    shop.work_until_all_are_done()
    assert batcher.count(["EVALSHA", "SET"]) == 3, batcher
    # The last one's, and the opener's, which has no key. EVAL repeats a script that the server did not know.
    assert len([trip for trip in batcher if trip[0] == "EVALSHA"]) == 3 + 2, batcher
