"""Runs the applicable tests of Django's task backends, and lists the others with a reason."""

from __future__ import annotations

from typing import Any
from unittest import TestSuite

from django.test.runner import DiscoverRunner

DUMMY, IMMEDIATE = "test_dummy_backend.DummyBackendTestCase", "test_immediate_backend.ImmediateBackendTestCase"
#: The reason for each test left out, by the test's name. docs/quality.md has the same list for readers.
LEFT_OUT = {
    f"{DUMMY}.test_refresh_result": "writes into the dummy's list, which is where it keeps its results",
    f"{DUMMY}.test_refresh_result_async": "writes into the dummy's list, which is where it keeps its results",
    f"{IMMEDIATE}.test_throws_keyboard_interrupt": "expects the error where the task is enqueued; a worker runs ours",
    f"{IMMEDIATE}.test_cannot_get_result": "ours can",
    f"{IMMEDIATE}.test_cannot_refresh_result": "ours can",
    f"{IMMEDIATE}.test_cannot_pass_run_after": "ours can",
}
#: Tests of a backend defined by the tests themselves.
OF_NO_BACKEND = "test_custom_backend."


class Runner(DiscoverRunner):
    def build_suite(self, *args: Any, **kwargs: Any) -> TestSuite:
        kept, left_out, of_no_backend = TestSuite(), {}, 0
        for test in _flat(super().build_suite(*args, **kwargs)):
            name = test.id().removeprefix("tasks.")
            if name in LEFT_OUT:
                left_out[name] = LEFT_OUT[name]
            elif name.startswith(OF_NO_BACKEND):
                of_no_backend += 1
            else:
                kept.addTest(test)
        if left_out.keys() != LEFT_OUT.keys():
            raise SystemExit(f"django_suite: Django has no test {sorted(LEFT_OUT.keys() - left_out.keys())} any more")
        for name, reason in left_out.items():
            print(f"left out: {name}: {reason}")
        print(f"left out: {of_no_backend} of {OF_NO_BACKEND[:-1]}, which test no backend of Django's or ours")
        return kept


def _flat(suite: Any) -> Any:
    for test in suite:
        if isinstance(test, TestSuite):
            yield from _flat(test)
        else:
            yield test
