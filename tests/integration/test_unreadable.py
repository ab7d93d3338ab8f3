"""A worker that cannot read what it is given loses nothing, and says so."""

from __future__ import annotations

import time

import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.encoder import JSONEncoder
from dramatiq.message import get_encoder, set_encoder

from dramatiq_policies import ConfigurationError, ErrorClassifier, Heartbeat, install
from dramatiq_policies.delivery import refusals

from .places import Place, until

pytestmark = pytest.mark.usefixtures("quick_restarts")

MOST = refusals.IN_A_ROW


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_FIRST_PAUSE", 0.3)
    monkeypatch.setattr(refusals, "_LAST_PAUSE", 0.5)


class Other(JSONEncoder):
    """Not the producers' encoder, until told so."""

    blind = True

    def decode(self, data: bytes) -> dict[str, object]:
        if self.blind:
            raise ValueError("not mine")
        return super().decode(data)


def test_a_worker_with_another_encoder_stops_and_goes_on_when_it_can_read(
    place: Place, caplog: pytest.LogCaptureFixture, tmp_path: object
) -> None:
    app = place.app()
    heartbeat = Heartbeat(f"{tmp_path}/beat")
    app.broker.add_middleware(heartbeat)
    ran = []

    @app.actor()
    def job(n: int) -> None:
        ran.append(n)

    for n in range(40):
        job.send(n)
    stock, other = get_encoder(), Other()
    set_encoder(other)
    try:
        with app.working(threads=1):
            until(lambda: "could not read 10 messages" in caplog.text)
            assert not heartbeat.well()
            # Through several pauses.
            time.sleep(2)
            assert app.outcomes == ["dead"] * MOST
            other.blind = False
            until(lambda: len(ran) == 40 - MOST)
            until(heartbeat.well)
    finally:
        set_encoder(stock)
    assert caplog.text.count("could not read 10 messages") == 1
    assert len(place.dead()) == MOST
    assert place.left() == []
    assert sorted([*ran, *(letter.args[0] for letter in place.dead())]) == list(range(40))


def test_a_message_that_a_worker_cannot_decode_is_left_to_one_that_can(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    app = place.app()

    @app.actor()
    def job() -> None:
        raise AssertionError

    sent = {job.send().message_id for _ in range(30)}
    stock = get_encoder()
    set_encoder(Other())
    try:
        with app.working(threads=1):
            until(lambda: "could not read 10 messages" in caplog.text)
            # None of them stays in this worker's hands.
            until(lambda: place.ready() == 30 - MOST)
    finally:
        set_encoder(stock)
    assert {message.message_id for message in [*place.left(), *place.dead()]} == sent


def test_some_garbage_among_messages_stops_nothing(place: Place) -> None:
    app, ran = place.app(), []

    @app.actor()
    def job(n: int) -> None:
        ran.append(n)

    job.send(20)  # Which declares the queue.
    for n in range(20):
        place.push(*[b"{"] * (MOST - 1), job.message(n).encode())
    with app.working():
        until(lambda: len(app.events) == 20 * MOST + 1)
    assert sorted(ran) == list(range(21))
    assert len(place.dead_bodies()) == 20 * (MOST - 1)


def test_a_body_that_is_too_large_is_dead_raw_before_it_is_decoded(place: Place) -> None:
    app = place.app(max_body_bytes=1_000)

    @app.actor()
    def job(text: str) -> None:
        pass

    job.send("x" * 2_000)
    job.send("y")
    app.work_until("dead", "succeeded")
    (dead,) = [event for event in app.events if event.outcome == "dead"]
    assert (dead.reason, dead.actor) == ("malformed", None)
    assert "max_body_bytes is 1000" in str(dead.exception)
    (body,) = place.dead_bodies()
    assert b"x" * 2_000 in body


def test_a_retry_that_no_worker_would_decode_is_dead_with_its_reason(place: Place) -> None:
    app = place.app(max_body_bytes=1_000)

    @app.actor(max_retries=3)
    def job(text: str) -> None:
        raise ValueError(text)

    size = len(job.message("").encode()) + 150
    job.send("x" * (1_000 - size))
    app.work_until("dead")
    assert app.events[0].reason == "handoff_failed"
    assert [letter.actor_name for letter in place.dead()] == ["job"]


@pytest.mark.parametrize("form", ["client", "url", "keyword"])
def test_a_client_that_decodes_answers_is_refused(redis_url: str, form: str) -> None:
    broker = {
        "client": lambda: RedisBroker(client=redis.Redis.from_url(redis_url, decode_responses=True)),
        "url": lambda: RedisBroker(url=f"{redis_url}?decode_responses=True"),
        "keyword": lambda: RedisBroker(decode_responses=True),
    }[form]()
    with pytest.raises(ConfigurationError, match="decode_responses"):
        install(broker)
    broker = RedisBroker(client=redis.Redis.from_url(redis_url, decode_responses=True))
    broker.add_middleware(ErrorClassifier())
    with pytest.raises(ConfigurationError, match="decode_responses"):
        broker.emit_before("worker_boot", None)


def test_delayed_messages_that_a_worker_cannot_read_stay_delayed(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    app, ran = place.app(), []

    @app.actor()
    def job(n: int) -> None:
        ran.append(n)

    for n in range(MOST + 5):
        job.send_with_options(args=(n,), delay=200)
    stock, other = get_encoder(), Other()
    set_encoder(other)
    try:
        with app.working(threads=1):
            until(lambda: "could not read 10 messages" in caplog.text)
            other.blind = False
            until(lambda: len(ran) == 5)
    finally:
        set_encoder(stock)
    assert app.outcomes.count("dead") == MOST
    assert place.left() == []
    assert sorted([*ran, *(letter.args[0] for letter in place.dead())]) == list(range(MOST + 5))
