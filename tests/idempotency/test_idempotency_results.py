"""Duplicates with stored results, in pipelines and in groups."""

from __future__ import annotations

import time

import pytest
from dramatiq import pipeline
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies.common import clock

from ..support import Stage
from .jobs import keep, with_results


def test_a_result_that_is_stored_is_not_warned_of(caplog):
    stage, backend = with_results()
    message = stage.actor(lambda: 5, actor_name="add", store_results=True).send()
    stage.run()
    assert backend.get_result(message) == 5
    assert "Results middleware" not in caplog.text


def test_a_duplicate_leaves_the_stored_result_alone():
    stage, backend = with_results()

    @stage.actor(idempotency_key="{order_id}", store_results=True)
    def ship(order_id):
        return f"shipped {order_id}"

    message = ship.send(7)
    stage.broker.enqueue(message)
    other = ship.send(7)
    stage.run()
    assert stage.outcomes() == ["succeeded", "duplicate", "duplicate"]
    assert backend.get_result(message) == "shipped 7"
    assert backend.get_result(other) == "shipped 7"


def test_the_result_of_a_duplicate_whose_first_result_expired_says_so():
    results = StubBackend()
    stage = Stage(middleware=[Results(backend=results)])
    ship = keep(stage, store_results=True, result_ttl=1)
    with stage.working():
        ship.send(1)
        stage.drain()
        time.sleep(0.01)
        duplicate = ship.send_with_options(args=(1,), result_ttl=60_000)
        stage.drain()
    assert stage.reasons() == [None, "completed"]
    with pytest.raises(ResultFailure) as told:
        duplicate.get_result(backend=results)
    assert told.value.orig_exc_msg.startswith("duplicate")


def test_a_job_that_done_when_answers_for_has_the_result_none_and_keeps_one_that_it_has():
    results = StubBackend()
    stage = Stage(middleware=[Results(backend=results)])
    done = []
    ship = stage.actor(
        lambda order_id: "shipped", actor_name="ship", store_results=True, done_when=lambda order_id: order_id in done
    )
    with stage.working():
        ran = ship.send(1)
        stage.drain()
        done += [1, 2]
        stage.broker.enqueue(ran)
        never_ran = ship.send(2)
        stage.drain()
    assert stage.reasons() == [None, "done", "done"]
    assert ran.get_result(backend=results) == "shipped"
    assert never_ran.get_result(backend=results) is None


def test_a_duplicate_moves_its_own_pipeline_on_with_the_first_message_s_result():
    stage, _ = with_results()
    told = []

    @stage.actor(idempotency_key="{order_id}", store_results=True)
    def ship(order_id):
        return f"shipped {order_id}"

    tell = stage.actor(lambda who, what: told.append((who, what)), actor_name="tell")
    pipeline([ship.message(7), tell.message("ann")], broker=stage.broker).run()
    pipeline([ship.message(7), tell.message("bob")], broker=stage.broker).run()
    stage.run()
    assert sorted(told) == [("ann", "shipped 7"), ("bob", "shipped 7")]


def test_a_duplicate_whose_next_step_needs_a_result_that_was_not_stored_is_dead():
    stage = Stage()
    told = []
    ship = keep(stage)
    tell = stage.actor(lambda *args: told.append(args), actor_name="tell")
    pipeline([ship.message(7), tell.message("ann")], broker=stage.broker).run()
    pipeline([ship.message(7), tell.message("bob")], broker=stage.broker).run()
    pipeline([ship.message(7), tell.message_with_options(args=("eve",), pipe_ignore=True)], broker=stage.broker).run()
    stage.run()
    assert sorted(told) == [("ann", None), ("eve",)]
    assert [event.reason for event in stage.events if event.outcome == "dead"] == ["no_result"]


def test_a_result_is_stored_again_until_the_backend_takes_it_before_the_key_is_completed(monkeypatch):
    class Restarting(StubBackend):
        failures = 3

        def _store(self, message_key, result, ttl):
            if self.failures:
                self.failures -= 1
                raise ConnectionError("no backend")
            super()._store(message_key, result, ttl)

    pauses = []
    monkeypatch.setattr(clock, "sleep", pauses.append)
    backend = Restarting()
    stage = Stage(middleware=[Results(backend=backend)])

    @stage.actor(idempotency_key="{order_id}", store_results=True)
    def ship(order_id):
        return f"shipped {order_id}"

    message = ship.send(7)
    stage.run()
    assert stage.outcomes() == ["succeeded"]
    assert backend.get_result(message) == "shipped 7"
    assert len(pauses) == 3


def test_a_backend_that_takes_no_result_holds_a_job_up_for_some_seconds_only(monkeypatch, caplog):
    class Gone(StubBackend):
        def _store(self, message_key, result, ttl):
            raise ConnectionError("no backend")

    pauses = []
    monkeypatch.setattr(clock, "sleep", pauses.append)
    stage = Stage(middleware=[Results(backend=Gone())])
    stage.actor(lambda: 1, actor_name="guarded", idempotent=True, store_results=True).send()
    stage.actor(lambda: 1, actor_name="unguarded", store_results=True).send()
    stage.actor(lambda: {1, 2}, actor_name="unstorable", idempotent=True, store_results=True).send()
    stage.run()
    assert stage.outcomes() == ["succeeded"] * 3
    assert 3 <= sum(pauses) <= 6


def test_the_redelivery_of_a_completed_message_settles_nothing_again():
    stage, _ = with_results()
    told = []

    @stage.actor(idempotency_key="{order_id}", store_results=True)
    def ship(order_id):
        return order_id

    tell = stage.actor(lambda what: told.append(what), actor_name="tell")  # noqa: PLW0108
    pipe = pipeline([ship.message(7), tell.message()], broker=stage.broker).run()
    stage.broker.enqueue(pipe.messages[0])
    stage.run()
    assert told == [7]
    assert stage.outcomes("ship") == ["succeeded", "duplicate"]
