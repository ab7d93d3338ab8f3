"""Whoever waits for a result in Redis sees the final one first, on both brokers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from dramatiq import Message
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import RedisBackend

from dramatiq_policies import Discard

from .places import Place


def seen(message: Message[Any], backend: RedisBackend) -> str:
    try:
        return f"result {message.get_result(backend=backend, block=True, timeout=30_000)}"
    except ResultFailure as failure:
        return str(failure)


@pytest.mark.parametrize("behind", [False, True], ids=["before the bundle", "behind the bundle"])
def test_a_waiting_caller_gets_the_final_result_first(
    place: Place, behind: bool, redis_client: redis.Redis, redis_namespace: str
) -> None:
    backend = RedisBackend(client=redis_client, namespace=redis_namespace)
    broker = place.broker()
    results = Results(backend=backend, store_results=True)
    if not behind:
        broker.add_middleware(results)
    app = place.app(broker=broker)
    if behind:
        broker.add_middleware(results)

    @app.actor(queue_timeout=1)
    def too_late(number: int) -> str:
        return "ran"

    @app.actor
    def refused(number: int) -> None:
        raise Discard("no")

    @app.actor
    def works(number: int) -> int:
        return number

    sent = [actor.send(number) for number in range(10) for actor in (too_late, refused, works)]
    with ThreadPoolExecutor(len(sent)) as waiters:
        waiting = [waiters.submit(seen, message, backend) for message in sent]
        with app.working():
            first = [waiter.result(60) for waiter in waiting]
    for message, got in zip(sent, first, strict=True):
        expected = {
            "too_late": "expired: waited",
            "refused": "discarded: no",
            "works": f"result {message.args[0] if message.args else None}",
        }[message.actor_name]
        assert expected in got
        assert seen(message, backend) == got
