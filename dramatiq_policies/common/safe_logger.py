"""Every log call of this package: `SafeLogger`. A call never raises, so logging never changes what becomes of a job.

- A filter, a handler, a ``LogRecordFactory`` or a text that raises is reported on stderr with the line, by ``logging.lastResort``.
  ``SystemExit`` is an error like any other here: in a worker's thread it would end the thread before the ack. Only an exception
  that stops the thread from outside passes: Ctrl-C, an interrupt of Dramatiq's, one of gevent's.
- A field of ours that the application's ``LogRecordFactory`` has set on the record already is overwritten: ours is about the
  message. Where ours is None, the application's value stays.
- Texts are printable: a line end or an escape sequence in an exception's text is written as its escape. Passwords are masked.
- ``logging.config`` disables each logger that exists already, by default. An alert, and a record of ERROR or above, of a
  disabled logger goes to the root logger.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from pathlib import PurePath
from typing import Any

from dramatiq.middleware import Interrupt

from .credentials import redact, redacted_repr
from .texts import printable

__all__ = ["ALERTS", "OUTCOMES", "Lines", "SafeLogger", "clean_stack", "is_heard", "make_safe", "write_to_stderr"]

OUTCOMES = "dramatiq_policies.outcomes"
ALERTS = "dramatiq_policies.alerts"


def _stops_the_thread(error: BaseException) -> bool:
    """Whether it came from outside of the log call, and is meant for what called it."""
    if isinstance(error, Exception):
        return False
    if isinstance(error, KeyboardInterrupt):
        # Ctrl-C reaches the main thread alone.
        return threading.current_thread() is threading.main_thread()
    return isinstance(error, (Interrupt, GeneratorExit)) or any(
        cls.__module__.partition(".")[0] in ("gevent", "greenlet") for cls in type(error).__mro__
    )


class Lines(str):
    """An argument of a log call that keeps its line ends, as a stack does."""

    __slots__ = ()


class _Shown(str):
    """What stands for an object of the application's, whose own text might show what it holds."""

    __slots__ = ()
    __repr__ = str.__str__


#: Arguments that show nothing but themselves.
_PLAIN = (type(None), int, float, str, BaseException, list, tuple, dict, PurePath, Enum, timedelta)


def _is_ours(value: Any) -> bool:
    return type(value).__module__.startswith("dramatiq_policies.")


class SafeLogger:
    """A logger of the standard library whose calls never raise.

    Parameters:
      name: The logger's name.
    """

    __slots__ = ("logger",)

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def debug(self, text: str, *args: Any, **more: Any) -> None:
        self._write(logging.DEBUG, text, args, **more)

    def info(self, text: str, *args: Any, **more: Any) -> None:
        self._write(logging.INFO, text, args, **more)

    def warning(self, text: str, *args: Any, **more: Any) -> None:
        self._write(logging.WARNING, text, args, **more)

    def error(self, text: str, *args: Any, **more: Any) -> None:
        self._write(logging.ERROR, text, args, **more)

    def exception(self, text: str, *args: Any, **more: Any) -> None:
        self._write(logging.ERROR, text, args, **{"exc_info": True, **more})

    def critical(self, text: str, *args: Any, **more: Any) -> None:
        self._write(logging.CRITICAL, text, args, **more)

    def log(self, level: int, text: str, *args: Any, **more: Any) -> None:
        self._write(level, text, args, **more)

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - the standard library's name
        return self.logger.isEnabledFor(level)

    def _write(
        self, level: int, text: str, args: tuple[Any, ...], exc_info: Any = None, extra: Mapping[str, Any] | None = None
    ) -> None:
        error: BaseException
        try:
            logger = self.logger
            if logger.disabled and (level >= logging.ERROR or logger.name == ALERTS):
                logger = logging.getLogger()
            if not logger.isEnabledFor(level):
                return
            if isinstance(exc_info, BaseException):
                exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
            elif exc_info and not isinstance(exc_info, tuple):
                exc_info = sys.exc_info()
            frame = sys._getframe(2)  # noqa: SLF001 - documented in spite of its name
            where = frame.f_code.co_filename, frame.f_lineno
            record = _record(logger, self.logger.name, level, where, text, args, exc_info or None, frame.f_code.co_name)
            _clean(record)
            for name, value in (extra or {}).items():
                if value is not None or name not in record.__dict__:
                    record.__dict__[name] = _clean_value(value)
            logger.handle(record)
            return
        except BaseException as raised:
            if _stops_the_thread(raised):
                raise
            error = raised
        write_to_stderr(self.logger.name, level, text, args, error)


def _record(
    logger: logging.Logger,
    name: str,
    level: int,
    where: tuple[str, int],
    text: str,
    args: Any,
    exc_info: Any,
    func: str,
) -> logging.LogRecord:
    try:
        return logger.makeRecord(name, level, *where, text, args, exc_info, func)
    except BaseException as error:
        if _stops_the_thread(error):
            raise
        # The application's factory raised: its fields are missing, ours are not.
        return logging.LogRecord(name, level, *where, text, args, exc_info, func)


def _safe(text: str, *, lines: bool = False) -> str:
    return printable(redact(text), lines=lines)


def _clean(record: logging.LogRecord) -> None:
    """Make the record's texts printable. Its template stays, and each argument that is printable."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            arg if isinstance(arg, _PLAIN) or _is_ours(arg) else _Shown(redacted_repr(arg)) for arg in record.args
        )
    try:
        text = record.getMessage()
        clean = _safe(text) == text
    except BaseException as error:
        if _stops_the_thread(error):
            raise
        clean = False
    if not clean:
        record.args = tuple(_printable(arg) for arg in record.args or ())
        text = record.getMessage()
        if (shown := _safe(text, lines=True)) != text:
            # A password of which one argument has the name and another the value.
            record.msg, record.args = shown, ()
    clean_stack(record)


def clean_stack(record: logging.LogRecord) -> None:
    """Have formatters write the record's stack without passwords, and with nothing that a terminal obeys."""
    if record.exc_info and record.exc_info[0] is not None:
        try:
            stack = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            if (shown := _safe(stack, lines=True)) != stack:
                record.exc_text = shown
        except BaseException as error:
            if _stops_the_thread(error):
                raise
            # As a handler's formatter would fail, too.
            record.exc_text = f"{record.exc_info[0].__qualname__}: its traceback raised {type(error).__name__}"


def _clean_value(value: Any, depth: int = 10) -> Any:
    """A field's value, with printable texts in it."""
    if isinstance(value, str):
        return _safe(value, lines=isinstance(value, Lines))
    if depth and type(value) in (dict, list, tuple):
        if type(value) is dict:
            return {_clean_value(name): _clean_value(one, depth - 1) for name, one in value.items()}
        return type(value)(_clean_value(one, depth - 1) for one in value)
    return value


def _printable(value: Any) -> Any:
    """An argument that can be formatted, whatever its own text holds or raises."""
    if value is None or isinstance(value, (int, float)):
        return value
    try:
        text = _safe(str(value), lines=isinstance(value, Lines))
        return _Shown(text) if isinstance(value, _Shown) else text
    except BaseException as error:
        if _stops_the_thread(error):
            raise
        return f"<{type(value).__name__}: its text raised {type(error).__name__}>"


def write_to_stderr(name: str, level: int, text: str, args: Any, error: BaseException | None = None) -> None:
    """The line, and why it could not be logged, where Python writes what no handler takes."""
    handler = logging.lastResort
    if handler is None or level < handler.level:
        return
    try:
        values = tuple(_printable(arg) for arg in args)
        line = text % values if values else text
        if error is not None:
            line += f" [could not be logged: {type(error).__name__}: {_printable(error)}]"
        handler.handle(logging.LogRecord(name, level, __file__, 0, line, (), None))
    except BaseException as raised:
        if _stops_the_thread(raised):
            raise


def make_safe(logger: logging.Logger) -> None:
    """Have a logger of Dramatiq's raise no more, once: its worker logs a failed job before any hook sees the failure."""
    if "handle" in vars(logger):
        return
    handle, make = logger.handle, logger.makeRecord

    def safe_handle(record: logging.LogRecord) -> None:
        try:
            handle(record)
        except BaseException as error:
            if _stops_the_thread(error):
                raise
            write_to_stderr(record.name, record.levelno, str(record.msg), record.args or (), error)

    def safe_make(name: str, level: int, file: str, line: int, *args: Any, **more: Any) -> logging.LogRecord:
        try:
            return make(name, level, file, line, *args, **more)
        except BaseException as error:
            if _stops_the_thread(error):
                raise
            return logging.LogRecord(name, level, file, line, *args[:4])

    vars(logger).update(handle=safe_handle, makeRecord=safe_make)


def is_heard(name: str, level: int) -> bool:
    """Whether a record of this logger and level is written anywhere.

    Looks at levels, disabled loggers, propagation, handlers' levels, and filters by name; not at filters with code of their own.
    """
    logger = logging.getLogger(name)
    if not logger.isEnabledFor(level):
        return False
    record = logging.LogRecord(name, level, __file__, 0, "", (), None)
    if not _passes(logger, record):
        return False
    found: logging.Logger | None = logger
    any_handler = False
    while found is not None:
        for handler in found.handlers:
            any_handler = True
            if not isinstance(handler, logging.NullHandler) and level >= handler.level and _passes(handler, record):
                return True
        if not found.propagate:
            # Nobody has chosen stderr for it.
            return False
        found = found.parent
    last = logging.lastResort
    return not any_handler and last is not None and level >= last.level


def _passes(filterer: logging.Filterer, record: logging.LogRecord) -> bool:
    return all(one.filter(record) for one in filterer.filters if type(one) is logging.Filter)
