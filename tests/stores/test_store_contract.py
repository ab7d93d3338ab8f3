"""The contract over every store that needs no server, and that a store which breaks it fails."""

from __future__ import annotations

import inspect
import threading
import types
from pathlib import Path

import pytest

from dramatiq_policies.stores import Entry
from dramatiq_policies.stores.memory import MemoryStore
from dramatiq_policies.testing import IdempotencyStoreContract

from ..project.test_readme import SNIPPET

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-store.md"


class TestMemoryStore(IdempotencyStoreContract):
    shared = False
    busy = 4

    @pytest.fixture
    def store(self):
        return MemoryStore()


class TestMemoryStoreOnAClockOfItsOwn(IdempotencyStoreContract):
    shared = False
    busy = 4

    @pytest.fixture
    def store(self):
        self.now = 1_000.0
        return MemoryStore(clock=lambda: self.now)

    def pass_time(self, store, ms):
        self.now += ms / 1_000


def snippets_of(page, upto):
    module = types.ModuleType("snippets")
    for snippet in SNIPPET.findall(page.read_text())[:upto]:
        exec(snippet, module.__dict__)
    return module


class TestTheStoreOfTheGuide(snippets_of(PAGE, 2).TestSQLiteStore):
    pass


# A store that does one thing wrong.


def swap_in_two_steps(self, key, expected, value, ttl):
    found = self.get(key)
    if found.value != expected:
        return found
    threading.Event().wait(0.0001)
    if value is None:
        self.delete(key)
    else:
        self.put(key, value, ttl)
    return None


def swap_whatever_is_there(self, key, expected, value, ttl):
    found = MemoryStore.get(self, key)
    if expected is None and found.value is not None:
        return found
    self.put(key, value, ttl) if value is not None else self.delete(key)
    return None


def swap_that_keeps_the_time(self, key, expected, value, ttl):
    return MemoryStore.swap(self, key, expected, value, self.get(key).left or ttl)


def renew_whatever_is_there(self, renewals):
    return [MemoryStore.get(self, r.key).value is not None and not self.put(*r) for r in renewals]


def renew_the_absent(self, renewals):
    for renewal in renewals:
        MemoryStore.swap(self, renewal.key, None, renewal.value, renewal.ttl)
    return MemoryStore.renew(self, renewals)


def text_only(self, key, value, ttl):
    MemoryStore._write(self, key, value.decode(errors="replace").encode(), ttl)


def by_the_callers_clock(self):
    import time

    MemoryStore.__init__(self, clock=lambda: time.time())  # noqa: PLW0108


def never_expires(self, key, value, ttl):
    MemoryStore._write(self, key, value, ttl + 1_000_000)


def without_case(self, key):
    return MemoryStore._find(self, key.lower())


def seconds_left(self, key):
    found = MemoryStore.get(self, key)
    return Entry(found.value, found.left // 1_000)


def no_new_lock(self):
    if not hasattr(self, "_lock"):
        self._lock = threading.Lock()


SABOTAGE = {
    "swaps in two steps": {"swap": swap_in_two_steps},
    "swaps whatever is there": {"swap": swap_whatever_is_there},
    "swaps without a new time": {"swap": swap_that_keeps_the_time},
    "renews whatever is there": {"renew": renew_whatever_is_there},
    "renews what is absent": {"renew": renew_the_absent},
    "keeps text": {"_write": text_only},
    "trusts the caller's clock": {"__init__": by_the_callers_clock},
    "never forgets": {"_write": never_expires},
    "mixes keys up": {"_find": without_case},
    "counts seconds": {"get": seconds_left},
    "says of every delete that it found something": {"delete": lambda self, key: MemoryStore.delete(self, key) or True},
    "ignores a put over something": {"put": lambda self, key, value, ttl: self.swap(key, None, value, ttl) and None},
    "renews for nothing": {"renew": lambda self, renewals: [False for _ in renewals]},
    "hangs in a fork": {"reset_after_fork": no_new_lock},
}


class Contract(IdempotencyStoreContract):
    shared = False
    busy = 4
    short = 60


Contract.__test__ = False


@pytest.mark.parametrize("what", SABOTAGE)
def test_a_store_that_breaks_the_contract_fails_it(what, monkeypatch):
    monkeypatch.setattr("dramatiq_policies.testing.concurrency.CHILD_ENDS_WITHIN", 0.5)
    made = type("Broken", (MemoryStore,), SABOTAGE[what])
    contract = Contract()
    tests = inspect.getmembers(contract, inspect.ismethod)
    # Most of these stores fail before the tests with threads and forks, which take long.
    for name, test in sorted(tests, key=lambda one: "thread" in one[0] or "fork" in one[0]):
        if name.startswith("test_"):
            try:
                test(made())
            except Exception:
                return
    pytest.fail(f"a store that {what} passes")
