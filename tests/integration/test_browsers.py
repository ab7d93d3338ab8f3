"""Dead letters and ready messages, while others work on the same queue, and what the server will not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pika
import pytest
from dramatiq import Message
from dramatiq.errors import ConnectionClosed

from dramatiq_policies import ops
from dramatiq_policies.brokers.readers import Item, browse, reader_of

from .places import App, RabbitmqPlace, RedisPlace, until
from .test_operating import bury, count_dead


def args_of(items: Iterator[Item]) -> list[Any]:
    return [Message.decode(item.body).args[0] for item in items]


# Redis: a browser shows the dead letters of its first look.


def test_a_browser_passes_over_dead_letters_that_others_take_or_add_meanwhile(redis_place: RedisPlace) -> None:
    app = redis_place.app()
    bury(redis_place, app, 4)
    letters, client = redis_place.key(f"{redis_place.queue}.XQ"), redis_place.client
    with browse(app.broker, redis_place.queue, dead=True) as browser:
        assert len(browser) == 4
        client.hdel(f"{letters}.msgs", "r1")
        client.zrem(letters, "r2")
        newer = Message(redis_place.queue, "job", (9,), {}, {})
        client.hset(f"{letters}.msgs", "r9", newer.encode())
        client.zadd(letters, {"r9": 1_700_000_000_900})
        assert args_of(iter(browser)) == [0, 3]


def test_a_browser_lists_nothing_after_others_have_taken_all_dead_letters(redis_place: RedisPlace) -> None:
    app = redis_place.app()
    bury(redis_place, app, 2)
    with browse(app.broker, redis_place.queue, dead=True) as browser:
        redis_place.client.delete(redis_place.key(f"{redis_place.queue}.XQ"))
        assert args_of(iter(browser)) == []


def test_a_dead_letter_that_another_process_replays_first_is_not_sent_again(redis_place: RedisPlace) -> None:
    app = redis_place.app()
    app.broker.declare_queue(redis_place.queue)
    bury(redis_place, app, 1)
    with (
        browse(app.broker, redis_place.queue, dead=True) as mine,
        browse(app.broker, redis_place.queue, dead=True) as theirs,
    ):
        (letter,), (same,) = list(mine), list(theirs)
        message = Message.decode(letter.body)
        assert theirs.send(same, message)
        assert not mine.send(letter, message)
    assert redis_place.ready() == 1


# RabbitMQ: what one reader has in hand another does not see.


@pytest.fixture
def commands(redis_place: RedisPlace) -> Iterator[Callable[[], list[str]]]:
    """Each call returns the commands that have touched the queue's list since the call before, those of scripts included."""
    key, client = redis_place.key(redis_place.queue), redis_place.client
    with client.monitor() as monitor:

        def read() -> list[str]:
            client.execute_command("ECHO", until := uuid4().hex)
            found = []
            for one in monitor.listen():
                name, *args = one["command"].split(" ")
                if until in args:
                    return found
                if key in args:
                    found.append(name.lower())
            raise AssertionError("unreachable")

        yield read


@pytest.mark.parametrize("keep", [2, 7], ids=["every other one stays", "most leave"])
def test_a_move_that_leaves_messages_in_front_never_scans_them(
    redis_place: RedisPlace, commands: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    monkeypatch.setattr("dramatiq_policies.brokers.redis.browser._PAGE", 10)
    app = redis_place.app()
    target = f"{redis_place.queue}_elsewhere"
    app.broker.declare_queue(target)
    scans = []
    for count in (20, 80):
        redis_place.client.delete(redis_place.key(redis_place.queue), redis_place.key(target))
        for number in range(count):
            app.broker.enqueue(Message(redis_place.queue, "job", (number,), {}, {}))
        commands()
        moved = ops.move(app.broker, redis_place.queue, target, where=lambda letter: letter.message.args[0] % keep != 0)
        scans.append(len([name for name in commands() if name in ("lpos", "lrem")]))
        stay = [number for number in range(count) if number % keep == 0]
        assert moved.count == count - len(stay)
        with browse(app.broker, redis_place.queue, dead=False) as ready:
            assert args_of(iter(ready)) == stay
            assert len(ready) == len(stay)
        with browse(app.broker, target, dead=False) as ready:
            assert args_of(iter(ready)) == [number for number in range(count) if number not in stay]
    assert scans == [2, 2]  # Holes are removed before and after.


def test_a_move_beside_workers_moves_each_message_that_they_leave(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dramatiq_policies.brokers.redis.browser._PAGE", 10)
    app = redis_place.app()
    target = f"{redis_place.queue}_elsewhere"
    app.broker.declare_queue(target)
    for number in range(60):
        app.broker.enqueue(Message(redis_place.queue, "job", (number,), {}, {}))
    key, client, taken = redis_place.key(redis_place.queue), redis_place.client, []
    bodies = client.hgetall(f"{key}.msgs")

    def take_some_and_choose(letter: Any) -> bool:
        if letter.message.args[0] % 5 == 0:
            name = client.lpop(key)
            taken.extend(Message.decode(bodies[one]).args[0] for one in [name] if one in bodies)
        return bool(letter.message.args[0] % 2)

    ops.move(app.broker, redis_place.queue, target, where=take_some_and_choose)
    with browse(app.broker, target, dead=False) as ready:
        moved = args_of(iter(ready))
    with browse(app.broker, redis_place.queue, dead=False) as ready:
        left = args_of(iter(ready))
    assert taken
    assert moved == sorted(moved)
    assert sorted([*moved, *left, *taken]) == list(range(60))
    assert not [number for number in left if number % 2]


def test_holes_of_a_move_that_was_killed_are_no_messages(redis_place: RedisPlace) -> None:
    app = redis_place.app()
    sent = [app.broker.enqueue(Message(redis_place.queue, "job", (number,), {}, {})) for number in range(3)]
    with browse(app.broker, redis_place.queue, dead=False) as ready:
        ready.close = lambda: None  # type: ignore[method-assign, attr-defined]
        for item in ready:
            if Message.decode(item.body).args == (1,):
                assert ready.drop(item)
    consumer = app.broker.consume(redis_place.queue, prefetch=5, timeout=100)
    received = []
    for message in consumer:
        if message is None:
            break
        received.append(message.message_id)
    assert received == [sent[0].message_id, sent[2].message_id]


@pytest.mark.parametrize("read", [iter, lambda browser: browser.read_all()], ids=["one by one", "all at once"])
def test_a_dead_letter_that_another_consumer_holds_is_left_to_it(rabbitmq_place: RabbitmqPlace, read: Any) -> None:
    app = rabbitmq_place.app()
    bury(rabbitmq_place, app, 3)
    with browse(app.broker, rabbitmq_place.queue, dead=True) as browser:
        assert len(browser) == 3
        rabbitmq_place.channel.basic_get(f"{rabbitmq_place.queue}.XQ")
        assert args_of(read(browser)) == [1, 2]
    rabbitmq_place.channel.basic_recover(requeue=True)


def test_an_undeclared_queue_takes_no_replay_and_the_dead_letter_stays(rabbitmq_place: RabbitmqPlace) -> None:
    app = rabbitmq_place.app()
    bury(rabbitmq_place, app, 1)
    with (
        pytest.raises(ops.OperationError, match=r"RabbitMQ has no queue 'dp-test-missing'\. Start a worker once"),
        browse(app.broker, rabbitmq_place.queue, dead=True) as browser,
    ):
        for letter in browser:
            browser.send(letter, Message.decode(letter.body).copy(queue_name="dp-test-missing"))
    until(lambda: count_dead(rabbitmq_place) == 1)


@pytest.fixture
def exclusive(rabbitmq_place: RabbitmqPlace) -> Iterator[App]:
    """The application's queues belong to another connection alone, so that the server lets nobody look at them."""
    with pika.BlockingConnection(pika.URLParameters(rabbitmq_place.url)) as owner:
        for name in (rabbitmq_place.queue, f"{rabbitmq_place.queue}.XQ"):
            owner.channel().queue_declare(name, exclusive=True)
        app = rabbitmq_place.app()
        app.broker.queues.add(rabbitmq_place.queue)
        yield app


def test_a_queue_that_the_server_refuses_to_show_is_one_sentence(rabbitmq_place: RabbitmqPlace, exclusive: App) -> None:
    with pytest.raises(
        ops.OperationError, match=r"RabbitMQ closed the connection \(ChannelClosedByBroker: RESOURCE_LOCKED"
    ):
        list(ops.dead_letters(exclusive.broker, queues=[rabbitmq_place.queue]))
    with pytest.raises(ConnectionClosed, match="RESOURCE_LOCKED"):
        reader_of(exclusive.broker).read(rabbitmq_place.queue)
    with pytest.raises(ops.OperationError, match="RESOURCE_LOCKED"):
        ops.check_live(exclusive.broker)
