"""A log call of this package never raises, and says as much as it can."""

from __future__ import annotations

import ast
import logging
import threading
from pathlib import Path

import pytest
from dramatiq.middleware import TimeLimitExceeded

import dramatiq_policies
from dramatiq_policies.common.safe_logger import ALERTS, Lines, SafeLogger, is_heard, make_safe

PACKAGE = Path(dramatiq_policies.__file__).parent
NAME = "dramatiq_policies.a_test"
#: Modules that may get a logger directly: they write nothing to it.
ASKS = {
    "common/safe_logger.py",
    "observability/worker_log.py",  # puts its filter on the worker's logger
    "testing/recorder.py",  # listens
    "cli/__init__.py",  # silences pika
    "cli/process.py",  # sets logging up
}


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)


@pytest.fixture
def heard():
    logger, handler = logging.getLogger(NAME), Heard()
    logger.addHandler(handler)
    logger.propagate = False
    yield handler.records
    logger.handlers.clear()
    logger.filters.clear()
    logger.propagate = True
    logger.disabled = False


@pytest.fixture
def factory():
    stock = logging.getLogRecordFactory()
    yield logging.setLogRecordFactory
    logging.setLogRecordFactory(stock)


class Strange(BaseException):
    pass


ERRORS = [ValueError, SystemExit, RecursionError, Strange, KeyError]


class Raises:
    def __init__(self, error):
        self.error = error

    def __call__(self, *args, **kwargs):
        raise self.error("no")

    filter = handle = __str__ = __call__
    level = 0


def calls_of(tree, names):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
            yield node


def test_every_log_call_of_the_package_goes_through_the_safe_logger():
    """A logger of the standard library is asked for where nothing is written to it, and warnings are for users' code."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        tree = ast.parse(path.read_text())
        if name not in ASKS:
            wrong += [f"{name}:{call.lineno}" for call in calls_of(tree, {"getLogger", "getChild", "get_logger"})]
        if name != "common/safe_logger.py":
            wrong += [
                f"{name}:{call.lineno}"
                for call in calls_of(tree, {"debug", "info", "warning", "error", "exception", "critical", "log"})
                if "logging" in (of := ast.dump(call.func.value)) or "getLogger" in of
            ]
    assert wrong == []


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["filter", "handler", "handler's filter", "factory", "argument"])
def test_an_error_within_logging_reaches_no_caller_and_the_line_is_written(error, where, heard, factory, capsys):
    logger = logging.getLogger(NAME)
    handler = logger.handlers[0]
    argument = "pay"
    if where == "filter":
        logger.addFilter(Raises(error))
    elif where == "handler":
        logger.handlers.insert(0, Raises(error))
    elif where == "handler's filter":
        handler.addFilter(Raises(error))
    elif where == "factory":
        factory(Raises(error))
    else:
        argument = Raises(error)
    SafeLogger(NAME).error("job %s of %d", argument, 7, extra={"actor": "pay"})
    written = [record.getMessage() for record in heard] + capsys.readouterr().err.splitlines()
    assert len(written) == 1
    assert written[0].startswith("job ")
    assert " of 7" in written[0]
    if where in ("factory", "argument"):
        assert heard[0].actor == "pay"


def test_an_exception_that_stops_the_thread_passes(heard):
    for error in (KeyboardInterrupt, TimeLimitExceeded):
        logging.getLogger(NAME).handlers.insert(0, Raises(error))
        with pytest.raises(error):
            SafeLogger(NAME).error("x")


def test_ctrl_c_that_a_handler_raises_in_a_workers_thread_ends_no_thread(heard, capsys):
    logging.getLogger(NAME).handlers.insert(0, Raises(KeyboardInterrupt))
    ended = []
    thread = threading.Thread(target=lambda: ended.append(SafeLogger(NAME).error("x")))
    thread.start()
    thread.join()
    assert ended == [None]


def test_arguments_in_a_field_are_printable_at_any_depth(heard):
    hostile = ("a\nb", [{"c\u202e": ["\ud83d", 1, None]}])
    SafeLogger(NAME).warning("x", extra={"job_args": hostile})
    assert heard[0].job_args == (r"a\nb", [{r"c\u202e": [r"\ud83d", 1, None]}])


def test_a_field_that_the_applications_factory_sets_too_is_ours_unless_ours_is_none(heard, factory):
    stock = logging.getLogRecordFactory()

    def tagged(*args, **kwargs):
        record = stock(*args, **kwargs)
        record.__dict__.update(actor="-", queue="-", tags=["web"], outcome="-", reason="-", message_id="-", attempt=0)
        return record

    factory(tagged)
    SafeLogger(NAME).warning("x", extra={"actor": "pay", "queue": "mail", "tags": None, "reason": None})
    (record,) = heard
    assert (record.actor, record.queue, record.tags, record.reason, record.outcome) == (
        "pay",
        "mail",
        ["web"],
        "-",
        "-",
    )


def test_a_record_names_the_line_that_wrote_it_and_keeps_its_template(heard):
    SafeLogger(NAME).info("one")
    logging.getLogger(NAME).setLevel("INFO")
    logger = SafeLogger(NAME)
    logger.info("job %s", "pay")
    try:
        raise ValueError("no")
    except ValueError as error:
        logger.exception("job %s", "pay")
        logger.log(logging.ERROR, "x", exc_info=error)
    logger.error("x", exc_info=None)
    logging.getLogger(NAME).setLevel("NOTSET")
    assert {record.pathname for record in heard} == {__file__}
    assert {record.funcName for record in heard} == {
        "test_a_record_names_the_line_that_wrote_it_and_keeps_its_template"
    }
    assert (heard[0].msg, heard[0].args, heard[0].levelno, heard[0].name) == ("job %s", ("pay",), logging.INFO, NAME)
    assert [record.exc_info and record.exc_info[0] for record in heard] == [None, ValueError, ValueError, None]


def test_a_line_end_an_escape_and_a_direction_mark_forge_no_line(heard):
    hostile = "a\nERROR forged\r\x1b[2J\u202etxt\u2066\u200f\x9b\u2028\ud83d b"
    escaped = r"a\nERROR forged\r\x1b[2J\u202etxt\u2066\u200f\x9b\u2028\ud83d b"
    try:
        raise ValueError(hostile)
    except ValueError as error:
        SafeLogger(NAME).error(
            "%s: %s", hostile, error, exc_info=True, extra={"actor": hostile, "tags": {"t": hostile}}
        )
    (record,) = heard
    assert record.getMessage() == f"{escaped}: {escaped}"
    assert (record.actor, record.tags) == (escaped, {"t": escaped})
    written = logging.Formatter("%(message)s").format(record)
    written.encode("utf-8")
    assert set(written) & set("\r\x1b\u202e\u2066\u200f\x9b\u2028\ud83d") == set()
    assert written.splitlines()[-1].startswith("ERROR forged\\r")  # A traceback keeps its line ends.


def test_a_password_of_two_arguments_is_masked(heard):
    SafeLogger(NAME).warning("%s=%s\nand %s", "password", "hunter2", Lines("a\nb"))
    assert heard[0].getMessage() == "password=***\nand a\nb"


def test_dramatiqs_own_logger_is_made_safe_once(heard, factory, capsys):
    logger = logging.getLogger(NAME)
    make_safe(logger)
    make_safe(logger)
    try:
        factory(Raises(ValueError))
        logger.error("job %s", "pay")
        assert [record.getMessage() for record in heard] == ["job pay"]
        logger.addFilter(Raises(SystemExit))
        logger.error("job %s", "mail")
        assert "job mail" in capsys.readouterr().err
        logger.handlers.insert(0, Raises(KeyboardInterrupt))
        logger.filters.clear()
        with pytest.raises(KeyboardInterrupt):
            logger.error("x")
    finally:
        del logger.handle, logger.makeRecord


def test_alerts_and_errors_go_to_the_root_where_logging_config_has_disabled_their_logger(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger(ALERTS), "disabled", True)
    monkeypatch.setattr(logging.getLogger(NAME), "disabled", True)
    SafeLogger(ALERTS).warning("alerted")
    SafeLogger(NAME).error("dead")
    SafeLogger(NAME).warning("not this")
    written = [(record.name, record.getMessage()) for record in caplog.records]
    assert written == [(ALERTS, "alerted"), (NAME, "dead")]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda logger: None, True),
        (lambda logger: setattr(logger, "disabled", True), False),
        (lambda logger: logger.setLevel(logging.CRITICAL), False),
        (lambda logger: logger.handlers.clear(), False),
        (lambda logger: logger.handlers.__setitem__(0, logging.NullHandler()), False),
        (lambda logger: logger.handlers[0].setLevel(logging.CRITICAL), False),
        (lambda logger: logger.handlers[0].addFilter(logging.Filter("shop")), False),
        (lambda logger: logger.handlers[0].addFilter(logging.Filter("dramatiq_policies")), True),
        (lambda logger: logger.addFilter(logging.Filter("shop")), False),
        (lambda logger: logger.handlers[0].addFilter(Raises(ValueError)), True),
    ],
)
def test_a_record_is_heard_if_a_handler_would_write_it(change, expected, heard):
    logger = logging.getLogger(NAME)
    logger.handlers[:] = [Heard()]  # pytest has put some of its own there.
    try:
        change(logger)
        assert is_heard(NAME, logging.ERROR) is expected
    finally:
        logger.setLevel("NOTSET")


def test_a_level_disabled_for_all_loggers_is_not_heard(heard):
    logging.disable(logging.ERROR)
    try:
        assert not is_heard(NAME, logging.ERROR)
        assert is_heard(NAME, logging.CRITICAL)
    finally:
        logging.disable(logging.NOTSET)
