"""Numbers and events from the ``dramatiq`` commands: of every process, each once, and none lost when it stops."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from ..support import SentryEndpoint, StatsdServer
from .places import Place, until
from .test_gevent import GeventApplication
from .test_processes import Application

REPORTING = """
import sentry_sdk
from dramatiq_policies import Metrics, SentryReporter
sentry_sdk.init(os.environ["APP_DSN"])
"""
JOBS = 300
FLAKY = 10
PERMANENT = 3


@pytest.fixture
def endpoint() -> Iterator[ThreadingHTTPServer]:
    with SentryEndpoint.server() as server:
        yield server


@pytest.mark.parametrize("kind", [Application, GeventApplication], ids=["threads", "gevent"])
def test_every_job_is_counted_and_every_bad_ending_reported(
    kind: type[Application], place: Place, tmp_path: Path, endpoint: ThreadingHTTPServer
) -> None:
    if kind is GeventApplication:
        pytest.importorskip("gevent")
    application = kind(place, tmp_path)
    module = application.module.read_text()
    module = module.replace("broker = ", f"{REPORTING}\nbroker = ", 1)
    module = module.replace("install(broker)", "install(broker, metrics=Metrics(), sentry=SentryReporter())", 1)
    application.module.write_text(module)
    server = StatsdServer()
    application.environment |= {
        "APP_DSN": f"http://key@127.0.0.1:{endpoint.server_port}/1",
        "STATSD_HOST": "localhost",
        "STATSD_PORT": str(server.port),
    }
    counted: Counter[str] = Counter()
    packets = []

    def count() -> None:
        while True:
            try:
                packets.append(server.packet())
            except (OSError, UnicodeDecodeError):
                return

    server.socket.settimeout(30)
    counting = threading.Thread(target=count)
    counting.start()
    try:
        for number in range(JOBS):
            application.send("job", number)
        for number in range(1_000, 1_000 + FLAKY):
            application.send("flaky", number, 1)
        for number in range(PERMANENT):
            application.send("hopeless", number)
        process = application.start(*([] if kind is GeventApplication else ["--processes", "2"]))
        application.wait_for(*(f"done {number}" for number in (*range(JOBS), *range(1_000, 1_000 + FLAKY))))
        until(lambda: len(place.dead()) == PERMANENT, 60, application.log.read_text)
        application.stop(process)
    finally:
        application.close()
        # The last one, which ends the counting.
        server.end()
        counting.join()
        server.close()
    for lines in packets:
        counted.update(line.partition(":")[0] for line in lines)
    # Each once, unless a message was run twice, and then so many times as it ran.
    assert application.lines()["done 0"] == 1
    assert counted["jobs.job.success"] == counted["jobs.job.duration"] == counted["jobs.job.wait"] == JOBS
    assert counted["jobs.flaky.retry"] == counted["jobs.flaky.failure"] == FLAKY
    assert counted["jobs.flaky.success"] == FLAKY
    assert counted["jobs.hopeless.dead"] == PERMANENT
    assert len(packets) <= JOBS + 2 * FLAKY + PERMANENT
    events = SentryEndpoint.events_of(endpoint)
    assert [event for event in events if "tags" not in event] == [], application.log.read_text()
    assert [(event["tags"]["actor"], event["tags"]["outcome"]) for event in events] == [
        ("hopeless", "dead")
    ] * PERMANENT
