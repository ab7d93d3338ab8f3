"""`SafeLogger`, the logger of this package. A log call never raises, so logging never changes the outcome of a job.

- If a filter, a handler, a ``LogRecordFactory`` or a text raises, ``logging.lastResort`` writes the line and the error to stderr.
  Even ``SystemExit`` is caught, because it would end the worker thread before the ack. Only exceptions that stop the thread from
  outside pass: Ctrl-C, interrupts of Dramatiq, exceptions of gevent.
- Our extra fields overwrite fields of the application's ``LogRecordFactory``, unless our value is None.
- Line ends and escape sequences in texts are escaped. Passwords are masked.
- ``logging.config`` disables existing loggers by default. Alerts and records of level ERROR or above then go to the root logger.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from typing import Any

from dramatiq.middleware import Interrupt

from .credentials import is_path, redact, redacted_repr
from .texts import printable

__all__ = ["ALERTS", "OUTCOMES", "Lines", "SafeLogger", "clean_stack", "is_heard", "make_safe", "write_to_stderr"]

OUTCOMES = "dramatiq_policies.outcomes"
ALERTS = "dramatiq_policies.alerts"


def _stops_the_thread(error: BaseException) -> bool:
    """Return whether the exception came from outside the log call and must pass."""
    if isinstance(error, Exception):
        return False
    if isinstance(error, KeyboardInterrupt):
        # Ctrl-C reaches the main thread alone.
        return threading.current_thread() is threading.main_thread()
    return isinstance(error, (Interrupt, GeneratorExit)) or any(
        cls.__module__.partition(".")[0] in ("gevent", "greenlet") for cls in type(error).__mro__
    )


class Lines(str):
    """A log argument that keeps its line ends, for example a stack."""

    __slots__ = ()


class _Shown(str):
    """A replacement for an application object, since the text of the object might show secrets."""

    __slots__ = ()
    __repr__ = str.__str__


#: Types with a safe text.
_PLAIN = (type(None), int, float, str, BaseException, list, tuple, dict, Enum, timedelta)


def _is_ours(value: object) -> bool:
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
        self,
        level: int,
        text: str,
        args: tuple[Any, ...],
        exc_info: object = None,
        extra: Mapping[str, Any] | None = None,
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
        # The application's factory raised. The record lacks only the fields of the factory.
        return logging.LogRecord(name, level, *where, text, args, exc_info, func)


def _safe(text: str, *, lines: bool = False) -> str:
    return printable(redact(text), lines=lines)


def _clean(record: logging.LogRecord) -> None:
    """Make the texts of the record printable. Keeps the template and each printable argument."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            arg if isinstance(arg, _PLAIN) or _is_ours(arg) or is_path(arg) else _Shown(redacted_repr(arg))
            for arg in record.args
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
            # One argument has the name of a secret, another has the value.
            record.msg, record.args = shown, ()
    clean_stack(record)


def clean_stack(record: logging.LogRecord) -> None:
    """Mask passwords and escape control characters in the stack of the record."""
    if record.exc_info and record.exc_info[0] is not None:
        try:
            stack = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            if (shown := _safe(stack, lines=True)) != stack:
                record.exc_text = shown
        except BaseException as error:
            if _stops_the_thread(error):
                raise
            # The formatter of a handler would fail too.
            record.exc_text = (
                f"{record.exc_info[0].__qualname__}: formatting the traceback raised {type(error).__name__}"
            )


def _clean_value(value: Any, depth: int = 10) -> Any:
    """Make all texts in the value of a field printable."""
    if isinstance(value, str):
        return _safe(value, lines=isinstance(value, Lines))
    if depth and type(value) in (dict, list, tuple):
        if type(value) is dict:
            return {_clean_value(name): _clean_value(one, depth - 1) for name, one in value.items()}
        return type(value)(_clean_value(one, depth - 1) for one in value)
    return value


def _printable(value: object) -> Any:
    """Return a printable argument, even if its ``__str__`` raises."""
    if value is None or isinstance(value, (int, float)):
        return value
    try:
        text = _safe(str(value), lines=isinstance(value, Lines))
        return _Shown(text) if isinstance(value, _Shown) else text
    except BaseException as error:
        if _stops_the_thread(error):
            raise
        return f"<{type(value).__name__}: str() raised {type(error).__name__}>"


def write_to_stderr(name: str, level: int, text: str, args: Any, error: BaseException | None = None) -> None:
    """Write the line, and the reason why logging failed, to stderr by ``logging.lastResort``."""
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
    """Patch a logger of Dramatiq so that log calls never raise. The worker logs a failed job before any hook sees the failure."""
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
    """Return whether any handler writes a record of this logger and level.

    Checks levels, disabled loggers, propagation, levels of handlers and filters by name. Ignores custom filters.
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
            # ``lastResort`` does not apply.
            return False
        found = found.parent
    last = logging.lastResort
    return not any_handler and last is not None and level >= last.level


def _passes(filterer: logging.Filterer, record: logging.LogRecord) -> bool:
    return all(one.filter(record) for one in filterer.filters if type(one) is logging.Filter)
