"""Tests for idempotency stores: the library's and yours."""

from __future__ import annotations

import threading
from typing import Any

from ..stores import Entry, IdempotencyStore, Renewal
from .claims_contract import ClaimsContract
from .concurrency import THREADS, clock_wrong_by, in_a_child, run_concurrently

__all__ = ["IdempotencyStoreContract"]

_LONG = 60_000
_EVERY_BYTE = bytes(range(256))
_KEYS = ("k", "K", "k ", "k\0", "\0k", "actor\0order:7", "é€😀", "a\nb", "%_*?[]{}", "k" * 2_000)


class IdempotencyStoreContract(ClaimsContract):
    """Tests for pytest. Derive a class, and provide the fixture ``store``, empty at the beginning of each test::

        class TestMyStore(IdempotencyStoreContract):
            @pytest.fixture
            def store(self):
                return MyStore(...)

    The tests call the store from 100 threads at once, fork (with ``os.fork``), and wait for leases of `short` to end.

    Attributes:
      short: The time to live, in milliseconds, of registers that expire. Longer than a few calls take. Default 400.
      shared: Whether other processes see the same registers. Default True; False for a store in memory.
      busy: The number of threads in a call during a fork. Default 0: the libraries below many stores can't bear
        more.
      rivals: The number of threads that update one register concurrently. Default 100. The work grows with the
        square: choose fewer for a slow store.
    """

    shared = True
    busy = 0
    rivals = THREADS

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
        # Each key in two calls: on a busy machine `short` may pass within more.
        store.put("a", b"one", self.short)
        store.put("a", b"one", _LONG)
        store.put("b", b"one", self.short)
        store.swap("b", b"one", b"one", _LONG)
        store.put("c", b"one", self.short)
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
            with clock_wrong_by(ahead):
                assert store.swap(key, None, b"one", _LONG) is None
                _holds(store, key, b"one", _LONG)
            _holds(store, key, b"one", _LONG)
        with clock_wrong_by(3_600):
            for key in ("behind", "ahead"):
                _holds(store, key, b"one", _LONG)

    # Repeated calls after a lost answer.

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

            answers = run_concurrently(take)
            winners = [number for number, answer in enumerate(answers) if answer is None]
            assert len(winners) == 1, winners
            # A loser may have looked before the winner wrote only if it says so.
            assert {answer.value for answer in answers if answer is not None} <= {b"%d" % winners[0], None}
            assert store.get(key).value == b"%d" % winners[0]

    def test_no_update_of_many_threads_is_lost(self, store: IdempotencyStore) -> None:
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

        run_concurrently(increment, self.rivals)
        assert store.get("k").value == b"%d" % self.rivals

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

        assert run_concurrently(live) == [[None, True, [True], None, True, True, Entry(None, 0)]] * THREADS

    def test_a_forked_child_uses_it_too_and_so_does_the_parent_afterwards(self, store: IdempotencyStore) -> None:
        store.put("k", b"parent", _LONG)
        done = threading.Event()

        def hammer(number: int) -> None:
            while not done.is_set():
                store.put(f"busy{number}", b"one", _LONG)

        run_concurrently(lambda number: store.put(f"idle{number}", b"one", _LONG))
        threads = [threading.Thread(target=hammer, args=(number,)) for number in range(self.busy)]
        for thread in threads:
            thread.start()
        try:
            for number in range(5):
                in_a_child(lambda number=number: _use_in_child(store, number))  # type: ignore[misc]
        finally:
            done.set()
            for thread in threads:
                thread.join()
        for number in range(5):
            assert store.get(f"child{number}").value == (b"child" if self.shared else None)
        _holds(store, "k", b"parent", _LONG)


def _holds(store: IdempotencyStore, key: str, value: bytes, ttl: int) -> None:
    found = store.get(key)
    assert found.value == value
    assert ttl - 10_000 < found.left <= ttl


def _use_in_child(store: IdempotencyStore, number: int) -> None:
    assert store.get("k").value == b"parent"
    assert store.swap(f"child{number}", None, b"child", _LONG) is None
    assert store.renew([Renewal(f"child{number}", b"child", _LONG)]) == [True]
