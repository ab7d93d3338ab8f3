"""Nothing is silent: the worker's own lines are dropped only where dramatiq_policies' are heard, and what is not heard is said."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
from dramatiq.middleware import SkipMessage

from dramatiq_policies import DiscardLogger, QueueMonitor, RetryPolicy, Threshold, constant
from dramatiq_policies.common.safe_logger import ALERTS, OUTCOMES

from ..support import Stage

WORKER = "dramatiq.worker.WorkerThread"


@pytest.fixture
def silent():
    """Undo what a test does to dramatiq_policies' loggers."""
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


def test_the_workers_line_is_dropped_where_ours_is_heard_and_nothing_is_logged_at_boot(caplog):
    failing()
    assert lines(caplog, WORKER) == []
    assert [record.levelname for record in lines(caplog, OUTCOMES)] == ["ERROR"]
    assert "Nobody hears" not in caplog.text


@pytest.mark.parametrize("silence", WAYS)
def test_the_workers_line_stays_where_ours_is_not_heard_and_a_worker_says_so_when_it_boots(silence, silent, caplog):
    silence(logging.getLogger(OUTCOMES))
    failing()
    assert [record.levelname for record in lines(caplog, WORKER)] == ["ERROR"]
    (said,) = [record for record in caplog.records if record.getMessage().startswith("Records on dead messages")]
    assert said.levelname == "WARNING"
    assert OUTCOMES in said.getMessage()
    assert ALERTS not in said.getMessage()


def test_a_dead_message_is_an_error_that_a_disabled_logger_does_not_hold_up(silent, caplog):
    logging.getLogger(OUTCOMES).disabled = True
    failing()
    assert [record.getMessage().partition(":")[0] for record in lines(caplog, OUTCOMES)] == ["dead (unclassified)"]


@pytest.mark.parametrize("silence", WAYS)
def test_a_line_that_is_not_heard_is_logged_through_a_logger_that_is(silence, silent, caplog):
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


@pytest.mark.parametrize(("on_alert", "said"), [("log", True), ([print, "log"], True), (print, False)])
def test_a_late_queue_is_a_warning_that_must_be_heard(on_alert, said, silent, caplog):
    logging.getLogger(ALERTS).setLevel(logging.ERROR)
    failing({"queue_monitor": QueueMonitor(thresholds={"default": Threshold(ready=1)}, on_alert=on_alert)})
    assert ("reach no handler" in caplog.text) is said


def test_a_line_that_no_logger_hears_is_written_on_stderr(silent, monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.NullHandler()])
    failing()
    assert "reach no handler" in capsys.readouterr().err


def test_a_level_without_a_handler_is_not_heard(caplog):
    with caplog.at_level(logging.INFO):
        failing({"discard_logger": DiscardLogger(level="DEBUG")})
    assert [record.levelname for record in lines(caplog, WORKER)][-1:] == ["ERROR"]


def test_a_line_of_dramatiqs_that_stays_has_a_stack_that_every_file_takes(caplog):
    stage = Stage(bundle={"discard_logger": False})

    @stage.actor(max_retries=0)
    def pay():
        raise ValueError("half \ud83d \x1b[2J redis://u:hunter2@h")

    pay.send()
    stage.run()
    (record,) = lines(caplog, WORKER)
    written = logging.Formatter().format(record)
    assert r"half \ud83d \x1b[2J redis://***@h" in written
    written.encode("utf-8")


def test_the_worker_s_line_remains_without_the_discard_logger(silent, caplog):
    logging.getLogger(OUTCOMES).disabled = True
    failing({"discard_logger": False})
    assert [record.levelname for record in lines(caplog, WORKER)] == ["ERROR"]
    assert "Nobody hears" not in caplog.text


# --- logging changes no job's fate ------------------------------------------------------------------------------------


class Strange(BaseException):
    pass


class Broken(logging.Handler):
    """Raises for every record, as an emit() never should."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def handle(self, *args, **kwargs):
        raise self.error("no")

    filter = handle


def set_every_field(record):
    for name in ("outcome", "reason", "actor", "queue", "message_id", "attempt", "exception_type", "exception_text"):
        setattr(record, name, "-")
    record.duration_ms, record.rule, record.tags, record.timeout_ms, record.traceparent = 0, "-", [], 0, "-"
    return record


@pytest.fixture
def disturb():
    """Break logging in one way, and mend it after the test."""
    stock, root = logging.getLogRecordFactory(), logging.getLogger()
    filtered = [logging.getLogger(name) for name in (WORKER, OUTCOMES, ALERTS)]
    added = []

    def break_it(way, error):
        root.setLevel(logging.DEBUG)
        if way == "factory that sets every field":
            logging.setLogRecordFactory(lambda *args, **kwargs: set_every_field(stock(*args, **kwargs)))
        elif way == "factory":
            logging.setLogRecordFactory(Broken(error).handle)
        elif way == "handler":
            added.append(Broken(error))
            root.addHandler(added[-1])
        elif way == "filter":
            added.append(Broken(error))
            for logger in filtered:
                logger.addFilter(added[-1])

    level = root.level
    yield break_it
    root.setLevel(level)
    logging.setLogRecordFactory(stock)
    for one in added:
        root.removeHandler(one)
        for logger in filtered:
            logger.removeFilter(one)


def fates(before_run=lambda: None):
    """How often each kind of job ran, and all outcomes, in two passes of one worker."""
    stage = Stage(retry_on={TimeoutError: RetryPolicy(attempts=2, wait=constant(1))})
    ran = Counter()

    @stage.actor(timeout=3_600_000, idempotent=True)
    def close_to_its_timeout():
        ran["close"] += 1

    @stage.actor(max_retries=0)
    def fails():
        ran["fails"] += 1
        raise KeyError("x")

    @stage.actor
    def retried():
        ran["retried"] += 1
        raise TimeoutError("x")

    @stage.actor(discard_on=KeyError)
    def discarded():
        ran["discarded"] += 1
        raise KeyError("x")

    @stage.actor(alert_on=KeyError)
    def alerts():
        ran["alerts"] += 1
        raise KeyError("x")

    @stage.actor
    def skipped():
        ran["skipped"] += 1
        raise SkipMessage("x")

    @stage.actor
    def well():
        ran["well"] += 1

    before_run()
    with pytest.MonkeyPatch.context() as patch:
        # However short a job was, it is said to be close to its timeout.
        for module in ("delivery.limits", "middleware.timeout"):
            patch.setattr(f"dramatiq_policies.{module}.WARN_RATIO", 0)
        patch.setattr("dramatiq_policies.delivery.limits._warned", set())
        send_all_and_run(stage, close_to_its_timeout, well, fails, retried, discarded, alerts, skipped)
    return ran, Counter((event.actor, event.outcome, event.reason) for event in stage.events)


def send_all_and_run(stage, *actors):
    for actor in actors:
        for _ in range(2):
            actor.send()
    actors[0].send_with_options(timeout=-3)
    stage.run(threads=2)


@pytest.fixture(scope="module")
def undisturbed():
    return fates()


@pytest.mark.parametrize("error", [ValueError, SystemExit, Strange])
@pytest.mark.parametrize("way", ["factory that sets every field", "factory", "handler", "filter"])
def test_logging_changes_no_jobs_fate(way, error, disturb, undisturbed):
    assert fates(lambda: disturb(way, error)) == undisturbed
