"""Dramatiq's own Prometheus middleware beside dramatiq_policies counts what happened, each once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import json, os
    import dramatiq
    from dramatiq import Worker
    from dramatiq.brokers.stub import StubBroker
    from dramatiq.middleware.prometheus import DB_PATH, Prometheus
    from dramatiq_policies import RetryPolicy, constant, install
    from tests.support import is_busy

    broker = StubBroker()
    for step in os.environ["ORDER"].split():
        install(broker) if step == "install" else broker.add_middleware(Prometheus())

    @dramatiq.actor(
        broker=broker,
        queue_name="mail",
        retry_on={OSError: RetryPolicy(attempts=3, wait=constant(20))},
        discard_on=KeyError,
        alert_on=LookupError,
        max_retries=1,
        min_backoff=10,
        max_backoff=10,
    )
    def send(error):
        if error:
            raise {"os": OSError, "key": KeyError, "lookup": LookupError, "value": ValueError}[error]

    for error in (None, None, "os", "key", "lookup", "value"):
        send.send(error)
    broker.emit_after("process_boot")
    worker = Worker(broker, worker_timeout=50, worker_threads=2)
    worker.start()
    while is_busy(broker):
        broker.join("mail", timeout=10_000, fail_fast=False)

    from prometheus_client import CollectorRegistry, multiprocess
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, DB_PATH)
    counted = {
        sample.name: sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.labels.get("le") is None and sample.labels["queue_name"] == "mail"
    }
    worker.stop()
    print(json.dumps(counted))
"""


@pytest.mark.parametrize("order", ["prometheus install", "install prometheus"])
def test_dramatiq_s_prometheus_counts_runs_errors_retries_and_dead_letters(tmp_path, order):
    environment = {**os.environ, "dramatiq_prom_db": str(tmp_path / "db"), "ORDER": order}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        timeout=60,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    counted = json.loads(ran.stdout)
    # 2 succeed, one error is tried 3 times, one twice, two once.
    assert counted["dramatiq_messages_total"] == 9
    assert counted["dramatiq_message_duration_milliseconds_count"] == 9
    assert counted["dramatiq_message_errors_total"] == 7
    assert counted["dramatiq_message_retries_total"] == 3
    # Exhausted twice, alerted once; what is discarded is no dead letter.
    assert counted["dramatiq_message_rejects_total"] == 3
    assert counted["dramatiq_messages_inprogress"] == 0
