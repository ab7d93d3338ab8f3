"""One record for each bad ending, which every way of logging can render."""

from __future__ import annotations

import io
import json
import logging

import pytest
import structlog
from pythonjsonlogger.json import JsonFormatter

from dramatiq_policies import ConfigurationError, DiscardLogger, Outcome, RetryPolicy, constant
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.outcomes import OutcomeEvent

from ..support import Stage

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class NoSuchOrder(Exception):
    pass


@pytest.fixture
def formatted():
    """Run a job that is discarded, with a handler of this formatter on dramatiq_policies' logger; what it wrote."""
    logger = logging.getLogger("dramatiq_policies.outcomes")
    handlers = []

    def run(formatter, **options):
        handler = logging.StreamHandler(io.StringIO())
        handler.setFormatter(formatter)
        handlers.append(handler)
        logger.addHandler(handler)
        stage = Stage(discard_on=NoSuchOrder)

        @stage.actor(queue_name="mails", tags={"team": "billing"})
        def send_mail(order):
            raise NoSuchOrder(f"no order {order}")

        send_mail.send_with_options(args=(7,), **options)
        stage.run()
        return handler.stream.getvalue(), stage.events[0]

    yield run
    for handler in handlers:
        logger.removeHandler(handler)


def expected(event):
    return {
        "outcome": "discarded",
        "reason": None,
        "actor": "send_mail",
        "queue": "mails",
        "message_id": event.message_id,
        "attempt": 1,
        "exception_type": f"{__name__}.NoSuchOrder",
        "exception_text": "no order 7",
        "duration_ms": event.duration_ms,
        "rule": event.rule,
        "tags": {"team": "billing"},
    }


# --- renderers ------------------------------------------------------------------------------------------------------


def test_python_json_logger_renders_every_field(formatted):
    written, event = formatted(JsonFormatter("%(levelname)s %(name)s %(message)s"))
    [line] = written.splitlines()
    record = json.loads(line)
    assert record.pop("levelname") == "WARNING"
    assert record.pop("name") == "dramatiq_policies.outcomes"
    assert event.message_id in record.pop("message")
    assert record == expected(event)


def test_structlog_renders_every_field(formatted):
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.ExtraAdder()],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()],
    )
    written, event = formatted(formatter)
    record = json.loads(written)
    assert record.pop("level") == "warning"
    assert event.message_id in record.pop("event")
    assert record == expected(event)


def test_a_line_of_plain_logging_is_a_sentence_and_has_the_fields_for_a_format(formatted):
    written, event = formatted(logging.Formatter("%(levelname)s [%(actor)s/%(queue)s] %(message)s"))
    assert written == (
        f"WARNING [send_mail/mails] discarded: message {event.message_id} of actor send_mail, attempt 1, "
        f"by the rule for NoSuchOrder: NoSuchOrder: no order 7\n"
    )


def test_a_traceparent_is_passed_on(formatted):
    written, _ = formatted(JsonFormatter(), traceparent=TRACEPARENT)
    assert json.loads(written)["traceparent"] == TRACEPARENT


@pytest.mark.parametrize("value", [3, None, "", ["00"]])
def test_a_traceparent_that_is_none_is_left_out(formatted, value):
    written, _ = formatted(JsonFormatter(), traceparent=value)
    assert "traceparent" not in json.loads(written)


def test_retries_and_alerts_carry_the_traceparent_too(caplog):
    caplog.set_level(logging.DEBUG, "dramatiq_policies")
    stage = Stage(retry_on={OSError: RetryPolicy(attempts=2, wait=constant(1), then="alert")})

    @stage.actor
    def mail():
        raise OSError

    mail.send_with_options(traceparent=TRACEPARENT)
    stage.run()
    records = [record for record in caplog.records if hasattr(record, "outcome")]
    assert [record.levelname for record in records] == ["WARNING", "DEBUG", "CRITICAL"]
    assert {record.traceparent for record in records} == {TRACEPARENT}


# --- levels ---------------------------------------------------------------------------------------------------------

ENDINGS = {
    "dead": OutcomeEvent(outcome=Outcome.DEAD, reason="exhausted", exception=OSError()),
    "expired": OutcomeEvent(outcome=Outcome.EXPIRED, exception=OSError()),
    "discarded": OutcomeEvent(outcome=Outcome.DISCARDED, exception=OSError()),
    "thrown": OutcomeEvent(outcome=Outcome.DEAD, reason="thrown", exception=OSError()),
}


def levels(caplog, logger):
    stage = Stage(bundle={"discard_logger": logger})
    caplog.clear()
    for event in ENDINGS.values():
        state_of(stage.broker).outcomes.publish(event, None)
    return dict(zip(ENDINGS, [record.levelname for record in caplog.records], strict=True))


def test_dead_and_expired_are_errors_discarded_and_thrown_are_warnings(caplog):
    assert levels(caplog, DiscardLogger()) == {
        "dead": "ERROR",
        "expired": "ERROR",
        "discarded": "WARNING",
        "thrown": "WARNING",
    }


@pytest.mark.parametrize("level", ["critical", "CRITICAL", logging.CRITICAL])
def test_a_single_level_holds_for_all_endings(caplog, level):
    assert set(levels(caplog, DiscardLogger(level=level)).values()) == {"CRITICAL"}


def test_a_mapping_of_levels_holds_for_single_endings(caplog):
    caplog.set_level(logging.INFO, "dramatiq_policies")
    logger = DiscardLogger(level={Outcome.DISCARDED: "info", "expired": logging.WARNING})
    assert levels(caplog, logger) == {"dead": "ERROR", "expired": "WARNING", "discarded": "INFO", "thrown": "WARNING"}


@pytest.mark.parametrize("log_args", ["False", 0, None])
def test_arguments_are_logged_by_nothing_but_a_plain_yes(log_args):
    with pytest.raises(ConfigurationError, match="DiscardLogger: log_args: expected True or False"):
        DiscardLogger(log_args=log_args)


@pytest.mark.parametrize("level", ["loud", True, 1.5, {"dead": "loud"}, {"retried": "info"}, {"alerted": "info"}])
def test_an_unknown_level_or_ending_is_refused(level):
    with pytest.raises(ConfigurationError, match="DiscardLogger: level"):
        DiscardLogger(level=level)


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [False, True])
def test_arguments_are_logged_only_on_demand(caplog, asked):
    stage = Stage(bundle={"discard_logger": DiscardLogger(log_args=asked)}, discard_on=NoSuchOrder)

    @stage.actor
    def mail(order, secret):
        raise NoSuchOrder

    mail.send(7, secret="hunter2")
    stage.run()
    [record] = [record for record in caplog.records if hasattr(record, "outcome")]
    assert getattr(record, "job_kwargs", None) == ({"secret": "hunter2"} if asked else None)
    assert asked == ("hunter2" in str(vars(record)))


def test_any_other_line_of_the_worker_stays(caplog):
    Stage()
    logging.getLogger("dramatiq.worker.WorkerThread").warning("Something else of message %s.", 7)
    assert "Something else of message 7." in caplog.text
