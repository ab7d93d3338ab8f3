"""What every idempotency store must do, as tests: for those of this library, and for one of your own."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

from ..claims import Claim, Claims
from ..delivery import Settlement
from ..outcomes import Outcome
from ..records import Defer, Record, Request, Skip
from ..stores import Entry, IdempotencyStore, Renewal

__all__ = ["IdempotencyStoreContract"]

T = TypeVar("T")

_LONG = 60_000
_THREADS = 100
#: In seconds.
_CHILD_ENDS_WITHIN = 10.0
_EVERY_BYTE = bytes(range(256))
_KEYS = ("k", "K", "k ", "k\0", "\0k", "actor\0order:7", "é€😀", "a\nb", "%_*?[]{}", "k" * 2_000)


class IdempotencyStoreContract:
    """Tests for pytest: derive from it, and provide the fixture ``store``, empty at the beginning of each test::

        class TestMyStore(IdempotencyStoreContract):
            @pytest.fixture
            def store(self):
                return MyStore(...)

    It is called from 100 threads at once, forks (where there is ``os.fork``), and waits for leases of `short` to end.

    Attributes:
      short: The time to live, in milliseconds, of what is to expire. Longer than a few calls take. Default 400.
      shared: Whether other processes see the same registers. Default True; a store in memory says False.
      busy: How many threads are in the middle of a call while it forks. Default 0: the libraries below many a store
        can't bear more.
    """

    short = 400
    shared = True
    busy = 0

    def pass_time(self, store: Any, ms: int) -> None:
        """Let as many milliseconds go by for the store; override it where its clock can be moved."""
        time.sleep(ms / 1_000)

    # Registers.

    def test_a_register_that_was_never_written_is_absent(self, store: IdempotencyStore) -> None:
        assert isinstance(store, IdempotencyStore)
        assert store.get("k") == Entry(None, 0)
        assert store.delete("k") is False

    def test_what_was_swapped_in_is_found_with_what_is_left_of_its_time(self, store: IdempotencyStore) -> None:
        assert store.swap("k", None, b"one", _LONG) is None
        _holds(store, "k", b"one", _LONG)

    def test_a_swap_that_expects_something_else_writes_nothing_and_says_what_is_there(
        self, store: IdempotencyStore
    ) -> None:
        assert store.swap("k", b"one", b"two", _LONG) == Entry(None, 0)
        assert store.swap("k", b"one", None, _LONG) == Entry(None, 0)
        assert store.get("k").value is None
        store.put("k", b"one", _LONG)
        for expected in (None, b"two", b"on", b"one\0"):
            for value in (b"three", None):
                found = store.swap("k", expected, value, 10 * _LONG)
                assert found is not None, (expected, value)
                assert found.value == b"one"
                assert 0 < found.left <= _LONG
        _holds(store, "k", b"one", _LONG)

    def test_a_swap_replaces_what_it_expects_and_begins_its_time_anew(self, store: IdempotencyStore) -> None:
        store.put("k", b"one", _LONG)
        assert store.swap("k", b"one", b"two", 10 * _LONG) is None
        _holds(store, "k", b"two", 10 * _LONG)
        assert store.swap("k", b"two", b"two", _LONG) is None
        _holds(store, "k", b"two", _LONG)

    def test_a_swap_to_nothing_empties_the_register(self, store: IdempotencyStore) -> None:
        store.put("k", b"one", _LONG)
        assert store.swap("k", b"one", None, 1) is None
        assert store.get("k") == Entry(None, 0)
        assert store.swap("k", None, None, 1) is None
        assert store.swap("k", None, b"two", _LONG) is None

    def test_put_writes_whatever_is_there(self, store: IdempotencyStore) -> None:
        for value in (b"one", b"two"):
            store.put("k", value, _LONG)
            _holds(store, "k", value, _LONG)

    def test_delete_says_whether_there_was_something(self, store: IdempotencyStore) -> None:
        store.put("k", b"one", _LONG)
        assert store.delete("k") is True
        assert store.delete("k") is False
        assert store.get("k") == Entry(None, 0)

    def test_renew_prolongs_what_still_holds_what_is_expected_and_nothing_else(self, store: IdempotencyStore) -> None:
        store.put("same", b"one", _LONG)
        store.put("other", b"two", _LONG)
        renewals = [Renewal(key, b"one", 10 * _LONG) for key in ("other", "same", "absent", "same")]
        assert store.renew(renewals) == [False, True, False, True]
        _holds(store, "same", b"one", 10 * _LONG)
        _holds(store, "other", b"two", _LONG)
        assert store.get("absent").value is None
        assert store.renew([]) == []

    def test_many_registers_are_renewed_at_once(self, store: IdempotencyStore) -> None:
        renewals = [Renewal(f"k{number}", b"one", 10 * _LONG) for number in range(200)]
        for renewal in renewals[::2]:
            store.put(renewal.key, renewal.value, _LONG)
        assert store.renew(renewals) == [True, False] * 100
        _holds(store, "k198", b"one", 10 * _LONG)

    def test_values_come_back_byte_by_byte(self, store: IdempotencyStore) -> None:
        for value in (b"\0", b"\xff\xfe", _EVERY_BYTE, b"\r\n", b"1", b"one", _EVERY_BYTE * 400):
            store.delete("k")
            assert store.swap("k", None, value, _LONG) is None
            assert store.get("k").value == value
            found = store.swap("k", None, b"x", _LONG)
            assert found is not None
            assert found.value == value
            assert store.renew([Renewal("k", value, _LONG)]) == [True]
            assert store.swap("k", value, _EVERY_BYTE, _LONG) is None

    def test_keys_are_any_text_and_each_has_a_register_of_its_own(self, store: IdempotencyStore) -> None:
        for number, key in enumerate(_KEYS):
            assert store.swap(key, None, b"%d" % number, _LONG) is None, key
        for number, key in enumerate(_KEYS):
            assert store.get(key).value == b"%d" % number, key
            assert store.renew([Renewal(key, b"%d" % number, _LONG)]) == [True]
            assert store.delete(key), key

    # Time.

    def test_what_has_expired_is_absent_for_every_call(self, store: IdempotencyStore) -> None:
        for key in "abcde":
            store.put(key, b"one", self.short)
        store.put("f", b"one", _LONG)
        self.pass_time(store, self.short + 50)
        assert store.get("a") == Entry(None, 0)
        assert store.delete("b") is False
        assert store.renew([Renewal("c", b"one", _LONG), Renewal("f", b"one", _LONG)]) == [False, True]
        assert store.swap("d", b"one", b"two", _LONG) == Entry(None, 0)
        assert store.swap("e", None, b"two", _LONG) is None

    def test_each_write_counts_its_time_from_then(self, store: IdempotencyStore) -> None:
        for key in "abc":
            store.put(key, b"one", self.short)
        store.put("a", b"one", _LONG)
        store.swap("b", b"one", b"one", _LONG)
        store.renew([Renewal("c", b"one", _LONG)])
        store.put("d", b"one", _LONG)
        store.put("d", b"one", self.short)
        self.pass_time(store, self.short + 50)
        for key in "abc":
            left = store.get(key).left
            assert _LONG - 10_000 < left <= _LONG, key
        assert store.get("d").value is None

    def test_the_callers_clocks_do_not_matter(self, store: IdempotencyStore) -> None:
        for key, ahead in (("behind", -3_600), ("ahead", 3_600)):
            with _clock_wrong_by(ahead):
                assert store.swap(key, None, b"one", _LONG) is None
                _holds(store, key, b"one", _LONG)
            _holds(store, key, b"one", _LONG)
        with _clock_wrong_by(3_600):
            for key in ("behind", "ahead"):
                _holds(store, key, b"one", _LONG)

    # Calls that are repeated, since nobody knows whether they were carried out.

    def test_a_call_that_is_repeated_finds_its_own_work_done(self, store: IdempotencyStore) -> None:
        for expected, value in ((None, b"one"), (b"one", b"two")):
            assert store.swap("k", expected, value, _LONG) is None
            found = store.swap("k", expected, value, _LONG)
            assert found is not None
            assert found.value == value
            assert found.left > 0
        for _ in range(2):
            assert store.renew([Renewal("k", b"two", _LONG)]) == [True]
        assert store.swap("k", b"two", None, 1) is None
        assert store.swap("k", b"two", None, 1) == Entry(None, 0)

    # Many at once.

    def test_of_a_hundred_threads_one_gets_the_register(self, store: IdempotencyStore) -> None:
        for round_ in range(3):
            key = f"k{round_}"

            def take(number: int, key: str = key) -> Entry | None:
                return store.swap(key, None, b"%d" % number, _LONG)

            answers = _at_once(take)
            winners = [number for number, answer in enumerate(answers) if answer is None]
            assert len(winners) == 1, winners
            # A loser may have looked before the winner wrote only if it says so.
            assert {answer.value for answer in answers if answer is not None} <= {b"%d" % winners[0], None}
            assert store.get(key).value == b"%d" % winners[0]

    def test_no_update_of_a_hundred_threads_is_lost(self, store: IdempotencyStore) -> None:
        store.put("k", b"0", _LONG)

        def increment(_: int) -> int:
            expected = store.get("k").value
            for tries in range(10_000):
                assert expected is not None
                found = store.swap("k", expected, b"%d" % (int(expected) + 1), _LONG)
                if found is None:
                    return tries
                expected = found.value
            raise AssertionError("never written")

        _at_once(increment)
        assert store.get("k").value == b"%d" % _THREADS

    def test_a_hundred_threads_with_a_register_each_do_not_disturb_one_another(self, store: IdempotencyStore) -> None:
        def live(number: int) -> list[Any]:
            key, one, two = f"k{number}", b"one %d" % number, b"two %d" % number
            return [
                store.swap(key, None, one, _LONG),
                store.get(key).value == one,
                store.renew([Renewal(key, one, _LONG)]),
                store.swap(key, one, two, _LONG),
                store.get(key).value == two,
                store.delete(key),
                store.get(key),
            ]

        assert _at_once(live) == [[None, True, [True], None, True, True, Entry(None, 0)]] * _THREADS

    def test_a_forked_child_uses_it_too_and_so_does_the_parent_afterwards(self, store: IdempotencyStore) -> None:
        store.put("k", b"parent", _LONG)
        done = threading.Event()

        def hammer(number: int) -> None:
            while not done.is_set():
                store.put(f"busy{number}", b"one", _LONG)

        _at_once(lambda number: store.put(f"idle{number}", b"one", _LONG))
        threads = [threading.Thread(target=hammer, args=(number,)) for number in range(self.busy)]
        for thread in threads:
            thread.start()
        try:
            for number in range(5):
                _in_a_child(lambda number=number: _use_in_child(store, number))  # type: ignore[misc]
        finally:
            done.set()
            for thread in threads:
                thread.join()
        for number in range(5):
            assert store.get(f"child{number}").value == (b"child" if self.shared else None)
        _holds(store, "k", b"parent", _LONG)

    # Claims over it, as a worker makes them.

    def test_of_many_messages_with_one_key_one_runs_and_the_others_wait(self, store: IdempotencyStore) -> None:
        with _claims(store, _LONG) as claim:
            answers = _at_once(lambda number: claim(f"m{number}"))
            winners = [answer for answer in answers if isinstance(answer, Claim)]
            assert len(winners) == 1
            assert all(0 < answer.left <= _LONG for answer in answers if isinstance(answer, Defer))
            assert sum(isinstance(answer, Defer) for answer in answers) == _THREADS - 1
            winners[0].conclude(_SUCCEEDED)
            winner = winners[0].record.message_id
            assert set(_at_once(lambda number: claim(f"m{number}"))) == {Skip("completed", winner), Skip("completed")}

    def test_of_many_copies_of_a_dead_workers_message_one_takes_over_at_once(self, store: IdempotencyStore) -> None:
        with _claims(store, _LONG) as claim:
            first = claim("m")
            assert isinstance(first, Claim)

            def is_first(record: Record) -> bool:
                return record.token == first.record.token

            answers = _at_once(lambda _: claim("m", is_dead=is_first))
            (taken,) = [answer for answer in answers if isinstance(answer, Claim)]
            assert taken.record.starts == 2
            # What the first one still says is said too late.
            first.conclude(_DEAD)
            assert store.get("key").value == taken.value

    def test_a_claim_is_another_messages_once_its_lease_has_ended(self, store: IdempotencyStore) -> None:
        with _claims(store, self.short) as claim:
            first = claim("m")
            assert isinstance(first, Claim)
            first.claims.close()  # Nobody renews it.
            assert isinstance(claim.unrenewed("other"), Defer)
            self.pass_time(store, self.short + 50)
            second = claim.unrenewed("other")
            assert isinstance(second, Claim)
            first.conclude(_DEAD)
            assert store.get("key").value == second.value

    def test_a_claim_lasts_as_long_as_it_is_renewed(self, store: IdempotencyStore) -> None:
        with _claims(store, self.short) as claim:
            first = claim("m")
            assert isinstance(first, Claim)
            for _ in range(6):
                self.pass_time(store, self.short // 3)
                first.claims.renew()
                assert isinstance(claim("other"), Defer)
            store.delete("key")
            first.claims.renew()
            assert store.get("key").value == first.value

    def test_a_copy_of_a_run_that_has_ended_is_stale_before_during_and_after_the_retry(
        self, store: IdempotencyStore
    ) -> None:
        with _claims(store, _LONG) as claim:
            first = claim("m")
            assert isinstance(first, Claim)
            first.conclude(Settlement(Outcome.RETRIED, delay_ms=1_000))
            assert claim("m") == Skip("stale")
            assert isinstance(claim("other"), Defer)
            retry = claim("m", run=1)
            assert isinstance(retry, Claim)
            assert claim("m") == Skip("stale")
            retry.conclude(_DEAD)
            assert [claim("m"), claim("m", run=1)] == [Skip("stale")] * 2
            assert isinstance(claim("other"), Claim)


_SUCCEEDED = Settlement(Outcome.SUCCEEDED)
_DEAD = Settlement(Outcome.DEAD, "exhausted")


class _Claiming:
    def __init__(self, claims: Claims) -> None:
        self.claims = claims

    def __call__(self, message_id: str, run: int = 0, is_dead: Callable[[Record], bool] = lambda record: False) -> Any:
        return self.claims.claim("key", Request(message_id, run, is_dead), keyed=True, keep=10 * _LONG)

    def unrenewed(self, message_id: str) -> Any:
        answer = self(message_id)
        self.claims.close()
        return answer


@contextmanager
def _claims(store: IdempotencyStore, lease: int) -> Iterator[_Claiming]:
    claims = Claims(store, lease)
    try:
        yield _Claiming(claims)
    finally:
        claims.close()


def _holds(store: IdempotencyStore, key: str, value: bytes, ttl: int) -> None:
    found = store.get(key)
    assert found.value == value
    assert ttl - 10_000 < found.left <= ttl


def _at_once(call: Callable[[int], T]) -> list[T]:
    """What a hundred threads get that begin at the same moment."""
    barrier = threading.Barrier(_THREADS)

    def begin(number: int) -> T:
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(begin, range(_THREADS)))


@contextmanager
def _clock_wrong_by(seconds: int) -> Iterator[None]:
    right = time.time
    wrong = mock.patch.multiple(
        time, time=lambda: right() + seconds, time_ns=lambda: round((right() + seconds) * 1_000_000_000)
    )
    with wrong:
        yield


def _use_in_child(store: IdempotencyStore, number: int) -> None:
    assert store.get("k").value == b"parent"
    assert store.swap(f"child{number}", None, b"child", _LONG) is None
    assert store.renew([Renewal(f"child{number}", b"child", _LONG)]) == [True]


def _in_a_child(work: Callable[[], None]) -> None:
    """Have it done by a forked child, within ten seconds."""
    if not hasattr(os, "fork"):
        return
    with warnings.catch_warnings():
        # Of a fork beside other threads, which is the point.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + _CHILD_ENDS_WITHIN
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("the store hangs in a forked child")
        time.sleep(0.005)
    assert ended[1] == 0, "the store failed in a forked child"
