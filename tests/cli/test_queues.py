"""`dramatiq-policies queues` and `monitor`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dramatiq import Message
from dramatiq.errors import ConnectionClosed

from dramatiq_policies import ops
from dramatiq_policies.brokers.stub.queue_reader import StubQueueReader

ROOT = Path(__file__).parents[2]
BROKER = """
from datetime import timedelta

from dramatiq_policies import QueueMonitor, Threshold
broker = StubBroker()
install(broker, queue_monitor=QueueMonitor(thresholds={"mail": Threshold(ready=2, dead=5)}, interval=timedelta(milliseconds=50)))
dramatiq.set_broker(broker)
"""
APP = """
@dramatiq.actor(queue_name="mail")
def send_mail(number): pass

@dramatiq.actor(queue_name="urgent")
def call(): pass

send_mail.send(1)
call.send()
call.send_with_options(delay=60_000)
"""


@pytest.fixture
def app(command):
    return command.app(APP, broker=BROKER)


def test_each_queue_says_how_much_waits_runs_and_has_died(command, app):
    mail, urgent = command.json("queues", app)
    assert (mail["queue"], mail["ready"], mail["delayed"], mail["running"], mail["dead"]) == ("mail", 1, 0, 0, 0)
    assert (urgent["queue"], urgent["ready"], urgent["delayed"]) == ("urgent", 1, 1)
    shown = command("queues", app).stdout.splitlines()
    assert shown[0].split() == ["queue", "ready", "delayed", "running", "dead", "oldest"]
    assert shown[1].split()[:5] == ["mail", "1", "0", "0", "0"]
    assert [line.split()[0] for line in command("queues", app, "--queue", "urgent").stdout.splitlines()[1:]] == [
        "urgent"
    ]


def test_a_breach_fails_only_if_asked_to(command, app):
    assert command("queues", app, "--fail-on-breach").exit_code == 0
    ops.load_broker(app).actors["send_mail"].send(2)
    assert command("queues", app).exit_code == 0
    result = command("queues", app, "--fail-on-breach")
    assert result.exit_code == 1
    assert result.stderr == "Queue mail: 2 messages wait (threshold 2)\n"
    mail, _ = command.json("queues", app)
    assert mail["breaches"] == [{"measure": "ready", "value": 2, "threshold": 2}]


def test_an_unknown_queue_without_a_near_name_gets_the_names_of_all_queues(command, app):
    sentence = command.refuses("queues", "move", app, "mail", "--to", "xyz")
    assert sentence == "Error: No actor uses a queue 'xyz'; the queues: mail, urgent."


def test_without_thresholds_there_is_nothing_to_fail_on(command):
    sentence = command.refuses("queues", command.app(APP), "--fail-on-breach")
    assert re.search(r"no QueueMonitor\. (Pass one to install|Add QueueMonitor)", sentence)


def test_watching_reads_repeatedly_and_shows_the_change(command, app, monkeypatch):
    turns = []

    def sleep(seconds):
        turns.append(seconds)
        ops.load_broker(app).actors["send_mail"].send(9)
        if len(turns) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    result = command("queues", "--watch", app, "--queue", "mail", "--interval", "500ms", "--format", "json")
    assert result.exit_code == 0
    readings = [json.loads(line) for line in result.stdout.splitlines()]
    assert [reading["ready"] for reading in readings] == [1, 2, 3]
    assert readings[0]["ready_per_second"] is None
    assert readings[1]["ready_per_second"] > 0
    assert turns == [0.5, 0.5, 0.5]


def test_messages_can_be_moved(command, app):
    broker = ops.load_broker(app)
    assert command("queues", "move", app, "mail", "--to", "urgent", "--yes").stdout == "1 message moved to urgent.\n"
    assert broker.queues["mail"].qsize() == 0
    assert broker.queues["urgent"].qsize() == 2
    assert command("queues", "move", app, "urgent", "--to", "mail", "--actor", "send_mail", "-y").stdout.startswith(
        "1 message "
    )
    assert "did you mean 'mail'" in command.refuses("queues", "move", app, "mial", "--to", "urgent")
    assert "in 'mail' already" in command.refuses("queues", "move", app, "mail", "--to", "mail")
    mistaken = command("queues", "move", app, "mail", "--to", "urgent", "--actor", "send_mial")
    assert mistaken.exit_code == 1
    assert mistaken.stderr == "Nothing matches --actor send_mial: 0 of 1 ready message; did you mean 'send_mail'?\n"


def test_a_move_asks_with_names_and_numbers_and_a_dry_run_only_counts(command, app):
    broker = ops.load_broker(app)
    no = command("queues", "move", app, "mail", "--to", "urgent", answers="n\n")
    assert (no.exit_code, no.stdout) == (1, "")
    assert "Move 1 message (1 of send_mail in mail) to urgent?" in no.stderr
    dry = command("queues", "move", app, "mail", "--to", "urgent", "--dry-run")
    assert dry.stdout == "1 message would be moved to urgent.\n"
    assert broker.queues["mail"].qsize() == 1
    yes = command("queues", "move", app, "mail", "--to", "urgent", answers="y\n")
    assert yes.stdout == "1 message moved to urgent.\n"
    assert broker.queues["mail"].qsize() == 0


def test_messages_of_an_actor_and_a_queue_that_are_gone_are_shown_and_can_be_moved(command, app):
    broker = ops.load_broker(app)
    broker.declare_queue("old")
    broker.enqueue(Message("old", "gone", (), {}, {}))
    del broker.actors["send_mail"]
    assert command("queues", "move", app, "old", "--to", "urgent", "--actor", "gone", "-y").stdout.startswith(
        "1 message"
    )


def test_queues_without_an_app_is_refused(command, app):
    assert "Missing argument 'APP'" in command.refuses("queues")


def test_a_misspelt_move_is_no_application(command, app):
    assert command.refuses("queues", "mov", app, "mail").startswith("Error: No such command 'mov'.")


def test_an_unreadable_message_is_not_moved_and_is_reported(command, app):
    broker = ops.load_broker(app)
    broker.queues["mail"].put(b"{no json")
    told = command("queues", "move", app, "mail", "--to", "urgent", "--yes")
    assert told.stdout == "1 message moved to urgent.\n"
    assert told.stderr == "1 message can't be read and remains in the queue.\n"
    assert broker.queues["mail"].qsize() == 1


def test_the_help_of_a_move_says_which_messages_move_and_which_stay(command):
    text = " ".join(command("queues", "move", "--help").stdout.split())
    for said in ("Move ready messages", "Delayed messages, dead letters", "loses no message", "--limit COUNT"):
        assert said in text


def test_the_monitor_needs_one_on_the_broker(command):
    assert "no QueueMonitor" in command.refuses("monitor", command.app(APP))


def monitoring(command, app):
    """The monitor as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "dramatiq_policies", "monitor", app],
        cwd=command.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_monitor_runs_as_a_process_until_a_signal_stops_it(command):
    app = command.app(APP + "send_mail.send(2)\n", broker=BROKER)
    with monitoring(command, app) as process:
        assert "Watching mail, urgent every 50 ms" in process.stderr.readline()
        assert "Queue mail: 2 messages wait (threshold 2)" in process.stderr.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_the_monitor_of_an_application_with_logging_of_its_own_logs_as_that_does(command):
    own = "import logging\nlogging.basicConfig(level=logging.INFO, format='OWN %(message)s')\n"
    app = command.app(APP, broker=own + BROKER)
    with monitoring(command, app) as process:
        assert process.stderr.readline() == "OWN Watching mail, urgent every 50 ms.\n"
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def test_a_broker_that_can_not_be_read_is_one_sentence(command, app, monkeypatch):
    def lost(*args):
        raise ConnectionClosed("no route to redis://user:secret@host/")

    monkeypatch.setattr(StubQueueReader, "read_all", lost)
    line = command.refuses("queues", app)
    assert line.startswith("Error: The broker can't be reached (ConnectionClosed: no route to redis://")
    assert "secret" not in line


@pytest.mark.parametrize("terminal", [False, True])
def test_people_watch_a_table(command, app, monkeypatch, terminal):
    monkeypatch.setattr(time, "sleep", interrupted_by_ctrl_c)
    shown = command("queues", "--watch", app, env={"FORCE_COLOR": "1"} if terminal else None).stdout
    assert re.search(r"mail +1 +0 +0 +0", shown)
    assert ("\x1b[?1049h" in shown) is terminal


def interrupted_by_ctrl_c(seconds):
    raise KeyboardInterrupt


def test_a_queue_that_can_t_be_read_has_no_change(command, monkeypatch):
    broker = """
from tests.brokers.test_other_brokers import ListBroker
broker = install(ListBroker())
dramatiq.set_broker(broker)
"""
    monkeypatch.setattr(time, "sleep", interrupted_by_ctrl_c)
    app = command.app("broker.declare_queue('mail')", broker=broker)
    (reading,) = map(json.loads, command("queues", "--watch", app, "--format", "json").stdout.splitlines())
    assert (reading["queue"], reading["ready"], reading["ready_per_second"]) == ("mail", None, None)
