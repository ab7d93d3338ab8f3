"""Jobs under the ``dramatiq-gevent`` command: retries, timeouts, the job's own view of itself, a shutdown."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .places import Place
from .test_processes import Application, until

JOBS = """
from contextvars import copy_context
from gevent import sleep, spawn
from dramatiq_policies import TimeoutExceeded, current_job

@dramatiq.actor(queue_name="{queue}", timeout=300, retry_on={{TimeoutExceeded: RetryPolicy(attempts=2, wait=constant(50))}})
def slow(number):
    job = current_job()
    note("slow", number, job.attempt)
    try:
        sleep(30 if job.attempt == 1 else 0)
    except TimeoutExceeded as error:
        note("timeout", number, error.limit_ms, error.message_id == job.message_id, job.remaining_ms())
        raise
    note("done", number)

@dramatiq.actor(queue_name="{queue}", timeout=10_000)
def looks(number):
    before = current_job()
    sleep(0.2)
    after = current_job()
    same = before.message_id == after.message_id and after.actor == "looks" and after.queue == "{queue}"
    spawned = spawn(current_job, None).get(), spawn(copy_context().run, current_job).get().actor
    note("looked", number, same, 0 < after.remaining_ms() < 9_900, *spawned)

note("outside", current_job(None))
"""


class GeventApplication(Application):
    def __init__(self, place: Place, folder: Path) -> None:
        super().__init__(place, folder)
        # The retries and the shutdown are those of the threads' application.
        self.module.write_text(self.module.read_text() + JOBS.format(queue=place.queue))

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(Path(sys.executable).with_name("dramatiq-gevent")), "jobs_app"]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*command, "--processes", "1", "--threads", "8", *arguments],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.running.append(process)
        return process


@pytest.fixture
def application(place: Place, tmp_path: Path):
    pytest.importorskip("gevent")
    one = GeventApplication(place, tmp_path)
    yield one
    one.close()


def test_retries_timeouts_and_current_job_work_under_gevent(place: Place, application: GeventApplication) -> None:
    for n in range(10):
        application.send("flaky", n, 1)
    for n in range(100, 104):
        application.send("slow", n)
    for n in range(200, 216):
        application.send("looks", n)
    application.send("hopeless", 0)
    process = application.start()
    done = [f"done {n}" for n in (*range(10), *range(100, 104))]
    last_check = [f"looked {n} True True None looks" for n in range(200, 216)]
    application.wait_for(*done, *last_check)
    application.stop(process)

    lines = application.lines()
    assert [lines[line] for line in (*done, *last_check)] == [1] * (len(done) + len(last_check))
    assert [lines[f"tried {n}"] for n in range(10)] == [2] * 10
    for n in range(100, 104):
        assert lines[f"slow {n} 1"] == lines[f"slow {n} 2"] == 1
        # In the job that was interrupted, and no time left there.
        assert lines[f"timeout {n} 300.0 True 0.0"] == 1, lines
    assert lines["outside None"] >= 1
    (letter,) = place.dead()
    assert letter.options["failure"]["reason"] == "unclassified"
    assert place.left() == []


def test_a_shutdown_under_gevent_puts_the_job_under_way_back(place: Place, application: GeventApplication) -> None:
    application.send("long", 1)
    process = application.start()
    until(lambda: any(line.startswith("began 1 ") for line in application.lines()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, application.log.read_text()
    assert application.lines()["done 1"] == 0, (application.lines(), application.log.read_text())

    process = application.start()
    application.wait_for("done 1")
    application.stop(process)
    assert application.lines()["done 1"] == 1
    assert place.left() == []
    assert place.dead() == []
