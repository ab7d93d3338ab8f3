"""Each delivery's numbers, by their names, in one datagram, whatever becomes of the server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from collections import Counter

import dramatiq
import pytest
from dramatiq import Worker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import Shutdown, SkipMessage

from dramatiq_policies import (
    ConfigurationError,
    Metrics,
    Outcome,
    OutcomeEvent,
    RetryPolicy,
    Snooze,
    StuckJob,
    Timeout,
    TimeoutExceeded,
    constant,
    install,
)
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.errors import HandoffFailed

from ..support import PlainClient, Stage, StatsdServer, TaggedClient


@pytest.fixture
def server(monkeypatch):
    server = StatsdServer()
    monkeypatch.setenv("STATSD_HOST", "127.0.0.1")
    monkeypatch.setenv("STATSD_PORT", str(server.port))
    yield server
    server.close()


def stage_with(client, **rules):
    return Stage(bundle={"metrics": Metrics(client)}, **rules)


def shape(lines):
    """Lines without their times."""
    return [re.sub(r":[0-9.]+\|ms", ":…|ms", line) for line in lines]


# --- names ----------------------------------------------------------------------------------------------------------


def names_of(event):
    client = PlainClient()
    broker = StubBroker()
    install(broker, metrics=Metrics(client))
    state_of(broker).outcomes.publish(event, None)
    return [name for _, name, _ in client.calls]


FINISHED = {"actor": "mail", "queue": "default", "duration_ms": 2.0, "wait_ms": 1.0}


@pytest.mark.parametrize(
    ("event", "counted"),
    [
        (OutcomeEvent(outcome=Outcome.RETRIED, exception=OSError(), **FINISHED), ["retry", "failure"]),
        (OutcomeEvent(outcome=Outcome.DISCARDED, exception=OSError(), **FINISHED), ["discard", "failure"]),
        (OutcomeEvent(outcome=Outcome.ALERTED, exception=OSError(), **FINISHED), ["alert", "failure"]),
        (OutcomeEvent(outcome=Outcome.DEAD, exception=OSError(), **FINISHED), ["dead", "failure"]),
        (
            OutcomeEvent(outcome=Outcome.RETRIED, exception=TimeoutExceeded(), **FINISHED),
            ["retry", "failure", "timeout"],
        ),
        (OutcomeEvent(outcome=Outcome.DEAD, exception=TimeoutExceeded(), **FINISHED), ["dead", "failure", "timeout"]),
        (OutcomeEvent(outcome=Outcome.DEFERRED, reason="snoozed", exception=Snooze(1), **FINISHED), ["deferred"]),
        (OutcomeEvent(outcome=Outcome.INTERRUPTED, exception=Shutdown(), **FINISHED), ["interrupted"]),
        (OutcomeEvent(outcome=Outcome.SKIPPED, **FINISHED), ["skipped"]),
        (OutcomeEvent(outcome=Outcome.DEAD, reason="handoff_failed", exception=HandoffFailed(), **FINISHED), ["dead"]),
    ],
    ids=lambda value: None if isinstance(value, OutcomeEvent) else "-".join(value),
)
def test_a_run_is_timed_and_its_outcome_counted(event, counted):
    assert names_of(event) == [f"jobs.mail.{name}" for name in ("duration", "wait", *counted)]


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (OutcomeEvent(outcome=Outcome.DUPLICATE, reason="completed", actor="mail"), "jobs.mail.duplicate"),
        (OutcomeEvent(outcome=Outcome.DEFERRED, reason="running", actor="mail"), "jobs.mail.deferred"),
        (OutcomeEvent(outcome=Outcome.EXPIRED, actor="mail", exception=HandoffFailed()), "jobs.mail.expired"),
        (OutcomeEvent(outcome=Outcome.DEAD, reason="malformed", exception=ValueError()), "jobs.unknown.dead"),
    ],
)
def test_a_message_that_did_not_run_has_no_duration_and_is_no_failure(event, name):
    assert names_of(event) == [name]


@pytest.mark.parametrize("client", [PlainClient(), TaggedClient()])
def test_the_metrics_of_a_success_are_its_duration_its_wait_and_its_count(client):
    stage = stage_with(client)
    stage.actor(lambda: None, actor_name="mail").send()
    stage.run()
    prefix = "jobs" if isinstance(client, TaggedClient) else "jobs.mail"
    assert [call[1] for call in client.calls] == [f"{prefix}.{name}" for name in ("duration", "wait", "success")]


def test_a_success_that_an_observer_gets_a_record_of_is_counted_once_too():
    client, seen = PlainClient(), []
    stage = stage_with(client)
    state_of(stage.broker).outcomes.observe(None, lambda event, message: seen.append(event.outcome))
    stage.actor(lambda: None, actor_name="mail").send()
    stage.run()
    assert seen == [Outcome.SUCCEEDED]
    assert [name for _, name, _ in client.calls].count("jobs.mail.success") == 1


def test_every_outcome_is_counted():
    for outcome in set(Outcome) - {Outcome.SUCCEEDED}:
        assert len(names_of(OutcomeEvent(outcome=outcome, actor="mail"))) == 1


def test_the_prefix_is_the_user_s():
    client = PlainClient()
    stage = Stage(bundle={"metrics": Metrics(client, prefix="shop.jobs")})
    stage.actor(lambda: None, actor_name="mail").send()
    stage.run()
    assert {name for _, name, _ in client.calls} == {
        "shop.jobs.mail.duration",
        "shop.jobs.mail.wait",
        "shop.jobs.mail.success",
    }


def test_with_dogstatsd_the_names_are_short_and_the_tags_say_the_rest():
    client = TaggedClient()
    stage = stage_with(client, retry_on={OSError: RetryPolicy(attempts=1)})

    @stage.actor(queue_name="mails", tags={"team": "billing"})
    def send_mail():
        raise OSError

    send_mail.send()
    stage.run()
    tags = {"team:billing", "actor:send_mail", "queue:mails", "outcome:dead"}
    assert [(kind, name, set(own)) for kind, name, _, own in client.calls] == [
        ("ms", "jobs.duration", tags),
        ("ms", "jobs.wait", tags),
        ("c", "jobs.dead", tags),
        ("c", "jobs.failure", tags),
    ]


# --- times ----------------------------------------------------------------------------------------------------------


def test_the_wait_counts_from_when_the_message_is_ready_and_the_duration_while_it_runs():
    client = PlainClient()
    stage = stage_with(client)
    began = time.monotonic()
    stage.actor(lambda: time.sleep(0.05), actor_name="mail").send_with_options(delay=200)
    time.sleep(0.35)
    stage.run()
    elapsed = (time.monotonic() - began) * 1_000
    values = {name: value for _, name, value in client.calls}
    assert 50 <= values["jobs.mail.duration"] <= elapsed - 350
    # 150 ms late, and not the 350 ms since it was sent.
    assert 100 <= values["jobs.mail.wait"] <= elapsed - 200 - 50 + 2


# --- datagrams ------------------------------------------------------------------------------------------------------


def test_a_job_is_one_datagram_at_most(server):
    stage = stage_with(None, retry_on={OSError: RetryPolicy(attempts=2, wait=constant(1))})

    @stage.actor
    def mail(fails):
        if fails:
            raise OSError

    ran = ["jobs.mail.duration:…|ms", "jobs.mail.wait:…|ms"]
    mail.send(False)
    stage.run()
    assert shape(server.packet()) == [*ran, "jobs.mail.success:1|c"]
    mail.send(True)
    stage.run()
    lines = server.packet()
    if len(lines) == 4:
        # The retry was over 50 ms ago.
        lines += server.packet()
    assert shape(lines) == [
        *(*ran, "jobs.mail.retry:1|c", "jobs.mail.failure:1|c"),
        *(*ran, "jobs.mail.dead:1|c", "jobs.mail.failure:1|c"),
    ]
    assert server.has_no_more()


def test_the_longest_name_still_fits_into_one(server):
    stage = stage_with(None)

    def job():
        raise TimeoutExceeded

    stage.actor(job, actor_name="shop:" + "x" * 1_000, max_retries=0).send()
    stage.run()
    lines = server.packet()
    assert len(lines) == 5
    assert len("\n".join(lines)) <= 1_432
    assert lines[0].startswith("jobs.shop_xxx")
    assert server.has_no_more()


# --- servers that are no help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid", "192.0.2.1"])
def test_a_server_that_is_not_there_changes_nothing_and_is_logged_at_most_once(host, server, monkeypatch, caplog):
    monkeypatch.setenv("STATSD_HOST", host)
    server.close()
    stage = stage_with(None)
    mail = stage.actor(lambda: None, actor_name="mail")
    for _ in range(100):
        mail.send()
    started = time.monotonic()
    stage.run()
    assert time.monotonic() - started < 5
    assert stage.outcomes() == ["succeeded"] * 100
    said = [record for record in caplog.records if "StatsD" in record.getMessage()]
    assert len(said) <= 1 if host == "192.0.2.1" else len(said) == 1


def test_a_client_that_raises_changes_nothing(caplog):
    class Broken(PlainClient):
        def timing(self, name, value):
            raise RuntimeError("no metrics today")

    stage = stage_with(Broken())
    mail = stage.actor(lambda: None, actor_name="mail")
    for _ in range(5):
        mail.send()
    stage.run()
    assert stage.outcomes() == ["succeeded"] * 5
    assert caplog.text.count("no metrics today") == 1


def test_a_client_that_hangs_holds_up_one_job_at_most():
    class Slow(PlainClient):
        def timing(self, name, value):
            time.sleep(0.2)

    stage = stage_with(Slow())
    mail = stage.actor(lambda: None, actor_name="mail")
    for _ in range(20):
        mail.send()
    started = time.monotonic()
    with stage.working():
        stage.drain()
        assert time.monotonic() - started < 2
    assert stage.outcomes() == ["succeeded"] * 20


# --- stuck jobs -----------------------------------------------------------------------------------------------------


@pytest.mark.untraced
@pytest.mark.parametrize("metrics_first", [True, False])
def test_a_stuck_job_is_counted_in_either_order_of_metrics_and_timeout(metrics_first):
    client, timeout = PlainClient(), Timeout(default=50, grace=50)
    broker = StubBroker()
    for middleware in (Metrics(client), timeout)[:: 1 if metrics_first else -1]:
        broker.add_middleware(middleware)

    @dramatiq.actor(broker=broker, max_retries=0)
    def report():
        time.sleep(0.4)

    report.send()
    worker = Worker(broker, worker_timeout=50, worker_threads=1)
    worker.start()
    broker.join("default", timeout=10_000, fail_fast=False)
    worker.stop()
    counted = Counter(name for kind, name, _ in client.calls if kind == "c")
    assert counted == {
        "jobs.report.stuck": 1,
        "jobs.report.dead": 1,
        "jobs.report.failure": 1,
        "jobs.report.timeout": 1,
    }


def test_a_stuck_job_has_its_actor_s_tags():
    client = TaggedClient()
    stage = stage_with(client)
    stage.actor(lambda: None, actor_name="report", tags={"team": "finance"})
    record = StuckJob(actor="report", queue="default", message_id="1", elapsed_ms=1.0, stack="")
    for tell in state_of(stage.broker).outcomes.stuck_subscribers:
        tell(record)
    assert client.calls == [("c", "jobs.stuck", 1, ["team:finance", "actor:report", "queue:default"])]


@pytest.mark.untraced
def test_a_stuck_job_is_counted_before_its_process_ends(server):
    script = textwrap.dedent("""
        import dramatiq, time
        from dramatiq import Worker
        from dramatiq.brokers.stub import StubBroker
        from dramatiq_policies import Metrics, Timeout, install

        broker = install(StubBroker(), metrics=Metrics(), timeout=Timeout(default=50, grace=50, on_stuck="exit"))

        @dramatiq.actor(broker=broker)
        def report():
            time.sleep(20)

        report.send()
        Worker(broker, worker_threads=1).start()
        time.sleep(20)
    """)
    environment = {**os.environ, "STATSD_HOST": "localhost"}
    ended = subprocess.run([sys.executable, "-c", script], timeout=30, env=environment, check=False)
    assert ended.returncode == 70
    assert server.packet() == ["jobs.report.stuck:1|c"]


# --- the rest -------------------------------------------------------------------------------------------------------


def test_a_message_skipped_by_another_middleware_is_counted_as_skipped():
    class Skipping(dramatiq.Middleware):
        def before_process_message(self, broker, message):
            raise SkipMessage

    client = PlainClient()
    stage = Stage(middleware=[Skipping()], bundle={"metrics": Metrics(client)})
    stage.actor(lambda: None, actor_name="mail").send()
    stage.run()
    assert client.calls == [("c", "jobs.mail.skipped", 1)]


def test_the_client_may_be_replaced_while_it_is_in_use():
    first, second = PlainClient(), TaggedClient()
    metrics = Metrics(first)
    stage = Stage(bundle={"metrics": metrics})
    mail = stage.actor(lambda: None, actor_name="mail")
    mail.send()
    stage.run()
    metrics.statsd = type(metrics.statsd)(second)
    mail.send()
    stage.run()
    assert len(first.calls) == len(second.calls) == 3
    assert second.calls[2][1] == "jobs.success"


@pytest.mark.parametrize("prefix", ["", "my jobs", "a:b", None, 3])
def test_a_prefix_that_statsd_would_misread_is_a_mistake(prefix):
    with pytest.raises(ConfigurationError, match="prefix"):
        Metrics(PlainClient(), prefix=prefix)
    with pytest.raises(ConfigurationError, match="queue_prefix"):
        Metrics(PlainClient(), queue_prefix=prefix)


def test_install_takes_no_client_for_a_metrics():
    with pytest.raises(ConfigurationError, match="a Metrics or None"):
        install(StubBroker(), metrics=PlainClient())


def test_a_duplicate_is_counted_as_one_and_the_job_that_it_repeats_once():
    client = PlainClient()
    stage = stage_with(client)
    mail = stage.actor(lambda order: None, actor_name="mail", idempotency_key="mail:{order}")
    mail.send(7)
    mail.send(7)
    stage.run()
    counted = Counter(name for kind, name, _ in client.calls if kind == "c")
    assert counted == {"jobs.mail.success": 1, "jobs.mail.duplicate": 1}


def test_names_that_grow_without_end_are_forgotten_and_made_again(monkeypatch):
    monkeypatch.setattr("dramatiq_policies.middleware.metrics._MOST_NAMES", 3)
    client = PlainClient()
    metrics = Metrics(client)
    stage = Stage(bundle={"metrics": metrics})
    jobs = [stage.actor(lambda: 1 / 0, actor_name=f"job{number}", max_retries=0) for number in range(8)]
    for job in jobs:
        job.send()
    stage.run()
    assert len(metrics._names) <= 3
    assert {f"jobs.job{number}.dead" for number in range(8)} <= {call[1] for call in client.calls}
