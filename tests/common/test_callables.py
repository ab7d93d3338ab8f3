"""Properties of a callable before its first call."""

from __future__ import annotations

import functools
import inspect

import pytest

from dramatiq_policies.common.callables import accepts_call_of


@pytest.mark.parametrize(
    ("job", "fn"),
    [
        (lambda a: 0, lambda a: 0),
        (lambda a: 0, lambda b: 0),  # send(7)
        (lambda a: 0, lambda *, a: 0),  # send(a=7)
        (lambda *, a: 0, lambda a: 0),
        (lambda a, b=2: 0, lambda a: 0),  # send(7)
        (lambda a, b=2: 0, lambda a, b: 0),
        (lambda a, b: 0, lambda *rest: 0),
        (lambda a, b: 0, lambda **options: 0),
        (lambda a, *, b: 0, lambda x, **options: 0),
        (lambda *rest: 0, lambda a, b: 0),
        (lambda **options: 0, lambda a: 0),
        (lambda *rest, **options: 0, lambda a, *, b: 0),
        (lambda a, b: 0, functools.partial(lambda x, a, b: 0, 1)),
        (lambda: 0, lambda: 0),
        (lambda: 0, lambda a=1: 0),
        (lambda a: 0, str),  # They don't say what they take.
        (lambda a: 0, min),
    ],
)
def test_a_callable_that_fits_a_call_of_the_job_is_taken(job, fn):
    assert accepts_call_of(fn, inspect.signature(job))


@pytest.mark.parametrize(
    ("job", "fn"),
    [
        (lambda a: 0, lambda: 0),
        (lambda a: 0, lambda a, b: 0),
        (lambda a, b: 0, lambda a: 0),
        (lambda a: 0, lambda *, b: 0),
        (lambda *, a: 0, lambda b: 0),
        (lambda *, a: 0, lambda *rest: 0),
        (lambda a, /: 0, lambda **options: 0),
        (lambda: 0, lambda a: 0),
        (lambda a, b: 0, functools.partial(lambda a, b: 0, 1)),
        (lambda a, *, b: 0, lambda a, *, c: 0),
    ],
)
def test_a_callable_that_fits_no_call_of_the_job_is_refused(job, fn):
    assert not accepts_call_of(fn, inspect.signature(job))
