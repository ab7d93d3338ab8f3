"""The text of a job's traceback."""

from __future__ import annotations

import sys
import traceback

import pytest

from dramatiq_policies import Outcome
from dramatiq_policies.delivery import tracebacks
from dramatiq_policies.delivery.decision import Decision
from dramatiq_policies.delivery.history import failure_of
from dramatiq_policies.delivery.tracebacks import traceback_of


def raised(error):
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_traceback_is_cut_at_its_beginning():
    error = raised(ValueError("x" * 20_000 + "the end"))
    text = failure_of(Decision(Outcome.DEAD, exception=error), {})["traceback"]
    assert len(text) == 10_000
    assert text.startswith("…")
    assert text.endswith("the end\n")


def test_a_short_traceback_is_not_cut():
    def shown(message):
        return failure_of(Decision(Outcome.DEAD, exception=raised(ValueError(message))), {})["traceback"]

    short = shown("x")
    assert short.startswith("Traceback (most recent call last):\n")
    assert short.endswith("in raised\n    raise error\nValueError: x\n")
    filled = shown("x" * (10_001 - len(short)))
    assert len(filled) == 10_000
    assert filled.startswith("Traceback (most recent call last):\n")


def test_the_traceback_of_a_deep_stack_shows_where_the_error_was_raised():
    # Two functions in turn, since a traceback folds calls of the same line.
    def ping(depth):
        pong(depth - 1)

    def pong(depth):
        if depth == 0:
            raise ValueError("at the bottom")
        ping(depth - 1)

    try:
        ping(41)
    except ValueError as error:
        text = failure_of(Decision(Outcome.DEAD, exception=error), {})["traceback"]
    assert 'raise ValueError("at the bottom")\n' in text
    assert text.count("  File ") == 30


def test_an_error_that_was_never_raised_has_no_traceback_and_that_of_one_that_can_not_be_shown_has_its_frames():
    class Odd(Exception):
        __cause__ = property(lambda self: 1 // 0)

    assert failure_of(Decision(Outcome.DEAD, exception=ValueError()), {})["traceback"] is None
    shown = failure_of(Decision(Outcome.DEAD, exception=raised(Odd("why"))), {})["traceback"]
    assert shown.startswith("Traceback (most recent call last):\n")
    assert "raise error" in shown
    assert shown.endswith(".Odd: why\n")


def caught(code):
    try:
        exec(compile(code, __file__, "exec"), {})
    except BaseException as error:
        return error.with_traceback(error.__traceback__.tb_next)


ERRORS = {
    "plain": "1 / 0",
    "with a cause": "try: 1 / 0\nexcept Exception as error: raise ValueError('why') from error",
    "with a context": "try: 1 / 0\nexcept Exception: raise ValueError('why')",
    "without its context": "try: 1 / 0\nexcept Exception: raise ValueError('why') from None",
    "of a syntax": "compile('a b', 'given', 'exec')",
    "of a name": "missing = 1\nmissin",
    "of an attribute": "class Stock: amount = 1\nStock().amout",
    "of an import": "from json import dump_s",
    "of a key": "{}['missing']",
    "of a user's class": "class Refused(Exception): __module__ = 'shop.errors'\nraise Refused('by the bank')",
    "without a text": "raise ValueError",
    "of two lines": "raise ValueError('one\\ntwo')",
    "of a recursion": "def again(): again()\nagain()",
}
if sys.version_info >= (3, 11):
    ERRORS["with a note"] = "error = ValueError('why')\nerror.add_note('on Monday')\nraise error"
    ERRORS["of a group"] = "raise ExceptionGroup('two', [ValueError(1), TypeError(2)])"


@pytest.mark.parametrize("code", ERRORS.values(), ids=ERRORS)
def test_a_traceback_reads_like_pythons_at_the_first_failure_and_at_the_next(code):
    error = caught(code)
    expected = "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-30))
    assert [traceback_of(error), traceback_of(error)] == [expected, expected]


def test_the_stack_of_a_place_is_formatted_once_and_the_text_of_an_error_each_time(monkeypatch):
    formatted = []
    format_tb = traceback.format_tb
    monkeypatch.setattr(
        traceback, "format_tb", lambda *args, **options: formatted.append(1) or format_tb(*args, **options)
    )
    texts = [traceback_of(raised(ValueError(number))) for number in range(3)]
    assert [text.splitlines()[-1] for text in texts] == ["ValueError: 0", "ValueError: 1", "ValueError: 2"]
    assert len(formatted) <= 1


def test_code_made_anew_shows_its_own_lines_and_is_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(tracebacks, "_MOST_FORMATTED", 3)
    for number in range(10):
        text = traceback_of(caught("\n" * number + "1 / 0"))
        assert f"line {number + 1}, in" in text
        assert len(tracebacks._formatted) <= 3
