"""Processes that are forked after the app was imported: an embedding supervisor, multiprocessing, a preloading server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .places import Place, RedisPlace, until

#: The common part of both servers' apps. Each child works until all jobs are done, and then a while longer.
APP = """\
import dramatiq, logging, multiprocessing, os, sys, time
import dramatiq_policies.brokers.redis.orphans as orphans
from dramatiq_policies import install
from dramatiq.brokers.{kind} import {broker_class}

orphans._CHECK_EVERY = 0.2
broker = install({broker_class}(url={url!r}, **{arguments!r}), **{installed})
journal = os.open({journal!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@dramatiq.actor(broker=broker, queue_name={queue!r})
def job(number):
    os.write(journal, b"%d %d\\n" % (number, os.getpid()))
    time.sleep(1.5)

def lines():
    return open({journal!r}).read().splitlines()

def work():
    worker = dramatiq.Worker(broker, worker_threads=2, worker_timeout=100)
    worker.start()
    until = time.monotonic() + 60
    while len(lines()) < 8 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(2)
    worker.stop()
    os._exit(0)

def fork(child):
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(1)
    return pid
"""
HOW = {
    "os.fork": "children = [fork(work) for _ in range(2)]\nfor child in children: os.waitpid(child, 0)\n",
    "multiprocessing": "context = multiprocessing.get_context('fork')\n"
    "children = [context.Process(target=work) for _ in range(2)]\n"
    "for child in children: child.start()\n"
    "for child in children: child.join()\n",
    "a parent that works, too": "if (child := fork(work)) == 0: pass\npid = os.getpid()\n"
    "worker = dramatiq.Worker(broker, worker_threads=2, worker_timeout=100)\nworker.start()\n"
    "os.waitpid(child, 0)\nworker.stop()\n",
}


def run(place: Place, journal: Path, code: str) -> subprocess.CompletedProcess[str]:
    on_redis = isinstance(place, RedisPlace)
    app = APP.format(
        kind=place.kind,
        broker_class="RedisBroker" if on_redis else "RabbitmqBroker",
        url=place.url,
        arguments={"namespace": place.namespace} if on_redis else {},
        installed="{}",
        journal=str(journal),
        queue=place.queue,
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", app + code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("how", HOW)
def test_forked_workers_run_each_job_once(place: Place, tmp_path: Path, how: str) -> None:
    journal = tmp_path / "journal"
    # The parent sends, so that it has connections when it forks.
    done = run(place, journal, f"for number in range(8): job.send(number)\n{HOW[how]}")
    runs = [line.split() for line in journal.read_text().splitlines()]
    assert Counter(number for number, _ in runs) == {str(number): 1 for number in range(8)}
    assert len({process for _, process in runs}) == 2
    assert "no thread holds" not in done.stderr
    assert place.left() == place.dead() == []


def test_a_child_and_its_parent_send_at_the_same_time(place: Place, tmp_path: Path) -> None:
    run(
        place,
        tmp_path / "journal",
        "job.send(0)\n"
        "def send():\n"
        "    for number in range(100): job.send(number)\n"
        "    os._exit(0)\n"
        "children = [fork(send) for _ in range(3)]\n"
        "for number in range(100): job.send(number)\n"
        "assert all(os.waitpid(child, 0)[1] == 0 for child in children)\n",
    )
    # RabbitMQ may still be reading what a process wrote before its end.
    sent: set[str] = set()

    def sent_until_now() -> int:
        sent.update(message.message_id for message in place.left())
        return len(sent)

    until(lambda: sent_until_now() >= 401, describe=lambda: len(sent))
    assert len(sent) == 401


def test_a_forked_child_holds_messages_under_an_id_of_its_own(redis_place: RedisPlace, tmp_path: Path) -> None:
    code = (
        "def say(): os.write(1, broker.broker_id.encode() + b'\\n'); os._exit(0)\n"
        "for _ in range(2): os.waitpid(fork(say), 0)\n"
        "print(broker.broker_id)\n"
    )
    said = run(redis_place, tmp_path / "journal", code).stdout.split()
    assert len(said) == len(set(said)) == 3


def in_a_child(look: Any) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, str(look()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a fork beside threads, which is the subject
def test_in_a_child_no_worker_runs_and_nothing_is_held(redis_place: RedisPlace) -> None:
    from dramatiq_policies.brokers.redis.prefetch import InFlight
    from dramatiq_policies.delivery.broker_state import state_of

    app = redis_place.app()
    state = state_of(app.broker)
    in_flight = state.shared(InFlight)
    state.stopping.set()
    in_flight.ids_of("q").add("an-id")
    state.fatal, state.in_command, state.last_polled_at = "NOAUTH", True, {"q": 1.0}

    def look() -> Any:
        return state.stopping.is_set(), in_flight.by_queue, state.fatal, state.in_command, state.last_polled_at

    assert in_a_child(look) == "(False, {}, None, False, {})"
    assert str(look()) == "(True, {'q': {'an-id'}}, 'NOAUTH', True, {'q': 1.0})"
