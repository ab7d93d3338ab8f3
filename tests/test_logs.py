"""Nothing is silent: the worker's own lines are dropped only where the bundle's are heard, and what is not heard is said."""

from __future__ import annotations

import logging

import pytest

from dramatiq_policies import DiscardLogger
from dramatiq_policies.safe_logger import ALERTS, OUTCOMES

from .support import Stage

WORKER = "dramatiq.worker.WorkerThread"


@pytest.fixture
def silent():
    """Undo what a test does to the bundle's loggers."""
    yield
    for name in (ALERTS, OUTCOMES, "dramatiq_policies"):
        logger = logging.getLogger(name)
        logger.disabled, logger.propagate = False, True
        logger.setLevel(logging.NOTSET)
        logger.handlers.clear()


def disable(logger):
    logger.disabled = True


def keep_apart(logger):
    logger.propagate = False
    logger.handlers[:] = [logging.NullHandler()]


WAYS = [disable, lambda logger: logger.setLevel(logging.CRITICAL + 1), keep_apart]


def failing(bundle=None, **options):
    stage = Stage(bundle=bundle)

    @stage.actor(max_retries=0, **options)
    def pay():
        raise KeyError("the reason")

    pay.send()
    stage.run()
    return stage


def lines(caplog, name):
    return [record for record in caplog.records if record.name == name]


def test_the_workers_line_is_dropped_where_ours_is_heard_and_nothing_is_said_at_boot(caplog):
    failing()
    assert lines(caplog, WORKER) == []
    assert [record.levelname for record in lines(caplog, OUTCOMES)] == ["ERROR"]
    assert "Nobody hears" not in caplog.text


@pytest.mark.parametrize("silence", WAYS)
def test_the_workers_line_stays_where_ours_is_not_heard_and_a_worker_says_so_when_it_boots(silence, silent, caplog):
    silence(logging.getLogger(OUTCOMES))
    failing()
    assert [record.levelname for record in lines(caplog, WORKER)] == ["ERROR"]
    (said,) = [record for record in caplog.records if record.getMessage().startswith("Nobody hears")]
    assert said.levelname == "WARNING"
    assert OUTCOMES in said.getMessage()
    assert ALERTS not in said.getMessage()


def test_a_dead_message_is_an_error_that_a_disabled_logger_does_not_hold_up(silent, caplog):
    logging.getLogger(OUTCOMES).disabled = True
    failing()
    assert [record.getMessage().partition(":")[0] for record in lines(caplog, OUTCOMES)] == ["dead (unclassified)"]


@pytest.mark.parametrize("silence", WAYS)
def test_what_is_not_heard_is_said_through_a_logger_that_is(silence, silent, caplog):
    for name in (ALERTS, OUTCOMES):
        silence(logging.getLogger(name))
    failing()
    (said,) = lines(caplog, WORKER)[:1]
    assert ALERTS in said.getMessage()
    assert OUTCOMES in said.getMessage()


def test_an_alert_of_a_disabled_logger_is_written_by_the_root(silent, caplog):
    for name in (ALERTS, OUTCOMES):
        logging.getLogger(name).disabled = True
    failing(alert_on=KeyError)
    (alert,) = lines(caplog, ALERTS)
    assert alert.levelname == "CRITICAL"


def test_where_nobody_hears_anything_it_is_said_on_stderr(silent, monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.NullHandler()])
    failing()
    assert "Nobody hears of dead messages" in capsys.readouterr().err


def test_a_level_that_is_asked_for_and_that_nobody_writes_is_not_heard(caplog):
    with caplog.at_level(logging.INFO):
        failing({"discard_logger": DiscardLogger(level="DEBUG")})
    assert [record.levelname for record in lines(caplog, WORKER)][-1:] == ["ERROR"]


def test_without_the_discard_logger_the_workers_line_is_what_there_is(silent, caplog):
    logging.getLogger(OUTCOMES).disabled = True
    failing({"discard_logger": False})
    assert [record.levelname for record in lines(caplog, WORKER)] == ["ERROR"]
    assert "Nobody hears" not in caplog.text
