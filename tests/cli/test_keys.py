"""`dramatiq-policies keys`: what idempotency remembers, by the job's arguments."""

from __future__ import annotations

import pytest
from dramatiq import Message

from dramatiq_policies import Idempotency, ops
from dramatiq_policies.testing import drain, fail, redeliver
from dramatiq_policies.testing.patching import in_place_of

APP = """
@dramatiq.actor(queue_name="mail", idempotency_key="order:{order_id}")
def send_mail(order_id, email="none"): pass

@dramatiq.actor(queue_name="mail", idempotency_key="user:{name}")
def greet(name: str): pass

@dramatiq.actor(queue_name="mail", idempotent=True)
def count(): pass

@dramatiq.actor(queue_name="mail")
def plain(): pass
"""


@pytest.fixture
def app(command):
    return command.app(APP)


def send(app, actor, *args):
    broker = ops.load_broker(app)
    message = broker.actors[actor].send(*args)
    return message, drain(broker)


def test_show_says_whether_a_job_has_run(command, app):
    assert command.json("keys", "show", f"{app}:send_mail", 7)["state"] == "none"
    message, _ = send(app, "send_mail", 7)
    state = command.json("keys", "show", f"{app}:send_mail", 7)
    assert (state["state"], state["key"], state["message_id"]) == ("completed", "order:7", message.message_id)
    assert 0 < state["left_ms"] <= 86_400_000
    assert command.json("keys", "show", f"{app}:send_mail", "order_id=7")["state"] == "completed"
    assert "completed" in command("keys", "show", f"{app}:send_mail", 7).stdout


def test_arguments_are_json_or_text_as_the_actor_says(command, app):
    send(app, "greet", "42")
    assert command.json("keys", "show", f"{app}:greet", "42")["key"] == "user:42"
    assert ops.read_arguments(ops.find_actor(f"{app}:greet"), ["42"]) == (["42"], {})
    assert ops.read_arguments(ops.find_actor(f"{app}:send_mail"), ["42", "email=ada@example.com"]) == (
        [42],
        {"email": "ada@example.com"},
    )


def test_a_misspelt_argument_is_no_value_and_gets_the_nearest_name(command, app):
    line = command.refuses("keys", "show", f"{app}:send_mail", "ordr_id=7")
    assert line == "Error: send_mail has no argument 'ordr_id'; did you mean 'order_id'?"
    assert command.json("keys", "show", f"{app}:greet", "YWJj==")["key"] == "user:YWJj=="
    assert command.json("keys", "show", f"{app}:greet", "name=nam=7")["key"] == "user:nam=7"


def test_arguments_that_don_t_fit_are_a_sentence_with_those_of_the_actor(command, app):
    for given, what in (([], "missing a required argument: 'order_id'"), ([1, 2, 3], "too many positional arguments")):
        line = command.refuses("keys", "show", f"{app}:send_mail", *given)
        assert line == f"Error: send_mail(order_id, email='none'): {what}."


def test_an_actor_without_a_key_of_its_own_goes_by_the_message_s_id(command, app):
    message, _ = send(app, "count")
    assert command.json("keys", "show", f"{app}:count", message.message_id)["state"] == "completed"


def test_a_key_that_is_forgotten_lets_the_next_message_run(command, app):
    send(app, "send_mail", 7)
    assert send(app, "send_mail", 7)[1].outcomes("send_mail") == ["duplicate"]
    assert command("keys", "forget", f"{app}:send_mail", 7).stdout == "Forgot order:7 (it was completed).\n"
    assert command("keys", "forget", f"{app}:send_mail", 7, "--yes").stdout == "There is no record of order:7.\n"
    assert send(app, "send_mail", 7)[1].outcomes("send_mail") == ["succeeded"]


def test_a_replay_runs_though_the_key_remembers_that_the_earlier_run_has_ended(command, app):
    broker = ops.load_broker(app)
    actor = broker.actors["send_mail"]
    with fail(actor, ValueError("no answer")):
        message = actor.send_with_options(args=(7,), max_retries=0)
        drain(broker).assert_outcomes(actor, "dead")
    assert command("dead", "replay", app, "--yes").stdout == "1 dead letter replayed.\n"
    with redeliver(Message.decode(broker.queues["mail"].queue[0]), broker):
        drain(broker).assert_outcomes(actor, "succeeded", "duplicate")
    assert command.json("keys", "show", f"{app}:send_mail", 7)["message_id"] == message.message_id


def test_an_actor_without_idempotency_is_reported_as_having_none(command, app):
    assert "plain" in command.refuses("keys", "show", f"{app}:plain")
    assert command.refuses("keys", "show", f"{app}:send_mail", "1", "2", "3", "4").startswith("Error: ")


def test_a_store_that_is_down_is_one_sentence(command, app, monkeypatch):
    broker = ops.load_broker(app)
    (idempotency,) = (middleware for middleware in broker.middleware if isinstance(middleware, Idempotency))

    def down(key):
        raise ConnectionError("refused")

    monkeypatch.setattr(idempotency.store, "get", down)
    line = command.refuses("keys", "show", f"{app}:send_mail", 7)
    assert line.startswith("Error: The idempotency store can't be reached (ConnectionError: refused")
    assert "refused" in line


def test_redis_that_is_down_has_the_same_sentence_as_in_every_command(command):
    app = command.app(
        APP,
        broker="""
from dramatiq.brokers.redis import RedisBroker
broker = RedisBroker(url="redis://:secret@localhost:1/0")
install(broker)
dramatiq.set_broker(broker)
""",
    )
    start = "Error: Redis can't be reached at localhost:1 (ConnectionError: "
    for words in (
        ("keys", "show", f"{app}:send_mail", "7"),
        ("keys", "forget", f"{app}:send_mail", "7"),
        ("queues", app),
        ("queues", app, "-q", "retired"),
        ("dead", "summary", app),
        ("dead", "list", app, "-q", "retired"),
        ("dead", "replay", app, "--yes"),
        ("check", app, "--live"),
    ):
        assert command.refuses(*words).startswith(start), words


def test_the_key_of_a_job_that_runs_is_forgotten_only_after_a_warning(command, app):
    actor = ops.load_broker(app).actors["send_mail"]
    seen = []

    def job(order_id, email="none"):
        seen.append(command("keys", "forget", f"{app}:send_mail", 7, answers="n\n"))
        seen.append(Idempotency.state(actor, 7).state)
        seen.append(command("keys", "forget", f"{app}:send_mail", 7, "--yes"))

    with in_place_of(actor, lambda fn: job):
        send(app, "send_mail", 7)
    asked, state, forced = seen
    assert "The job is running; a second run may start beside it." in asked.output
    assert state == "running"
    assert "(it was running)" in forced.stdout
