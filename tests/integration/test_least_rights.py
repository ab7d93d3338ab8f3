"""A user of Redis that may do what docs/brokers.md says, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import dramatiq
import pytest
from dramatiq import Worker
from dramatiq.brokers.redis import RedisBroker

from dramatiq_policies import Idempotency, QueueMonitor, RetryPolicy, constant, current_job, install
from dramatiq_policies.stores.redis import RedisStore
from tests.chaos.servers import RedisServer

from .places import until

PAGE = Path(__file__).parents[2] / "docs" / "brokers.md"
(LINE,) = [line for line in PAGE.read_text().splitlines() if line.startswith("ACL SETUSER jobs ")]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    one = RedisServer(tmp_path / "server")
    one.start()
    yield one
    one.close()


def set_user(server: RedisServer, line: str) -> str:
    with server.client() as client:
        client.execute_command(*line.split())
    return server.url.replace("redis://", "redis://jobs:secret@")


@pytest.mark.parametrize("namespace", ["dramatiq", "shop"])
def test_a_redis_user_with_the_documented_rights_works_and_logs_nothing(
    server: RedisServer, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    line = LINE if namespace == "dramatiq" else LINE.replace("~dramatiq ~dramatiq:* ~idem:*", "~shop ~shop:*")
    broker = RedisBroker(url=set_user(server, line), namespace=namespace)
    install(broker, queue_monitor=QueueMonitor(interval=100))
    runs: list[int] = []

    @dramatiq.actor(
        broker=broker, idempotent=True, max_retries=0, retry_on={OSError: RetryPolicy(attempts=3, wait=constant(50))}
    )
    def job(number: int) -> None:
        runs.append(number)
        if current_job().attempt == 1:
            raise OSError
        if number == 2:
            raise KeyError

    for number in range(3):
        job.send(number)
    worker = Worker(broker, worker_timeout=100, worker_threads=2)
    worker.start()
    with server.client() as client:
        until(lambda: sorted(runs) == [0, 0, 1, 1, 2, 2], 20, lambda: (runs, caplog.text))
        until(lambda: client.zcard(f"{namespace}:default.XQ") == 1)
        worker.stop(10_000)
        refused = [entry[b"object"] if b"object" in entry else entry["object"] for entry in client.acl_log()]
    assert set(refused) <= {"info", b"info"}
    said = [one for one in caplog.records if one.name.endswith("alerts")]
    assert not said, caplog.text
    broker.close()


def test_a_redis_user_without_the_right_to_read_single_keys_works_and_reports_no_lost_data(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    broker = install(RedisBroker(url=set_user(server, f"{LINE} -get")))
    ran = threading.Event()

    @dramatiq.actor(broker=broker)
    def job() -> None:
        ran.set()

    job.send()
    worker = Worker(broker, worker_timeout=100, worker_threads=1)
    worker.start()
    began = ran.wait(10)
    worker.stop(10_000)
    broker.close()
    assert began, caplog.text
    assert "refuses this worker" not in caplog.text


def test_a_redis_user_without_rights_on_the_store_is_one_log_line(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    broker = install(RedisBroker(url=set_user(server, LINE.replace("~idem:*", "~idem:no"))))

    @dramatiq.actor(broker=broker, idempotent=True)
    def job() -> None: ...

    job.send()
    worker = Worker(broker, worker_timeout=100, worker_threads=1)
    worker.start()
    until(lambda: "deferred" in caplog.text or "store_down" in caplog.text or "refuses this user" in caplog.text, 20)
    worker.stop(10_000)
    said = [one for one in caplog.records if one.levelname in ("ERROR", "CRITICAL")]
    assert len(said) == 1
    assert "permanently refuses this user" in said[0].getMessage()
    broker.close()


def test_a_store_client_that_is_down_holds_no_job_that_has_ended_while_the_broker_answers(server: RedisServer) -> None:
    own = set_user(server, "ACL SETUSER jobs on >secret ~* &* +@all")
    broker = install(
        RedisBroker(url=server.url), idempotency=Idempotency(RedisStore.from_url(own, namespace="dramatiq:idem"))
    )
    begun, gate = threading.Event(), threading.Event()

    @dramatiq.actor(broker=broker, idempotent=True)
    def job() -> None:
        begun.set()
        gate.wait(20)

    message = job.send()
    worker = Worker(broker, worker_timeout=100, worker_threads=1)
    worker.start()
    with server.client() as client:
        assert begun.wait(20)
        client.execute_command("ACL", "SETUSER", "jobs", "off")
        client.execute_command("CLIENT", "KILL", "USER", "jobs")
        gate.set()
        until(lambda: client.hlen("dramatiq:default.msgs") == 0, 20)
        client.execute_command("ACL", "SETUSER", "jobs", "on")
        until(lambda: Idempotency.state(job, message.message_id).state == "completed", 20)
    worker.stop(10_000)
    broker.close()
