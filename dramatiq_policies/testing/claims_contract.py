"""Tests of claims over an idempotency store: the part of `store_contract` with more than store calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..delivery.decision import Decision
from ..idempotency.actions import Request, SkipDuplicate, WaitForOwner
from ..idempotency.claim import Claim
from ..idempotency.claims import Claims
from ..idempotency.records import Record
from ..outcomes import Outcome
from ..stores import IdempotencyStore
from .concurrency import THREADS, run_concurrently

__all__ = ["ClaimsContract"]

_LONG = 60_000
_SUCCEEDED = Decision(Outcome.SUCCEEDED)
_DEAD = Decision(Outcome.DEAD, "exhausted")


class ClaimsContract:
    """Claims of messages with the same key, as a worker makes them. `IdempotencyStoreContract` includes these tests."""

    short = 400

    def pass_time(self, store: Any, ms: int) -> None:
        """Let milliseconds pass for the store; override the method if you can move the store's clock."""
        time.sleep(ms / 1_000)

    def test_of_many_messages_with_one_key_one_runs_and_the_others_wait(self, store: IdempotencyStore) -> None:
        with _claims(store, _LONG) as claim:
            answers = run_concurrently(lambda number: claim(f"m{number}"))
            winners = [answer for answer in answers if isinstance(answer, Claim)]
            assert len(winners) == 1
            assert all(0 < answer.left <= _LONG for answer in answers if isinstance(answer, WaitForOwner))
            assert sum(isinstance(answer, WaitForOwner) for answer in answers) == THREADS - 1
            claim.finish(winners[0], _SUCCEEDED)
            winner = winners[0].record.message_id
            assert set(run_concurrently(lambda number: claim(f"m{number}"))) == {
                SkipDuplicate("completed", winner),
                SkipDuplicate("completed"),
            }

    def test_of_many_copies_of_a_dead_workers_message_one_takes_over_at_once(self, store: IdempotencyStore) -> None:
        with _claims(store, _LONG) as claim:
            first = claim("m")
            assert isinstance(first, Claim)

            def is_first(record: Record) -> bool:
                return record.token == first.record.token

            answers = run_concurrently(lambda _: claim("m", is_dead=is_first))
            (taken,) = [answer for answer in answers if isinstance(answer, Claim)]
            assert taken.record.starts == 2
            # The first claim's conclusion comes too late.
            claim.finish(first, _DEAD)
            assert store.get("key").value == taken.value

    def test_a_claim_is_another_messages_once_its_lease_has_ended(self, store: IdempotencyStore) -> None:
        with _claims(store, self.short) as claim:
            first = claim("m")
            assert isinstance(first, Claim)
            claim.claims.close()  # The lease is not renewed.
            assert isinstance(claim.unrenewed("other"), WaitForOwner)
            self.pass_time(store, self.short + 50)
            second = claim.unrenewed("other")
            assert isinstance(second, Claim)
            claim.finish(first, _DEAD)
            assert store.get("key").value == second.value

    def test_a_claim_lasts_as_long_as_it_is_renewed(self, store: IdempotencyStore) -> None:
        with _claims(store, self.short) as claim:
            first = claim("m")
            assert isinstance(first, Claim)
            for _ in range(6):
                self.pass_time(store, self.short // 3)
                claim.claims.leases.renew()
                assert isinstance(claim("other"), WaitForOwner)
            store.delete("key")
            claim.claims.leases.renew()
            assert store.get("key").value == first.value

    def test_a_copy_of_a_run_that_has_ended_is_stale_before_during_and_after_the_retry(
        self, store: IdempotencyStore
    ) -> None:
        with _claims(store, _LONG) as claim:
            first = claim("m")
            assert isinstance(first, Claim)
            claim.finish(first, Decision(Outcome.RETRIED, delay_ms=1_000))
            assert claim("m") == SkipDuplicate("stale")
            assert isinstance(claim("other"), WaitForOwner)
            retry = claim("m", run=1)
            assert isinstance(retry, Claim)
            assert claim("m") == SkipDuplicate("stale")
            claim.finish(retry, _DEAD)
            assert [claim("m"), claim("m", run=1)] == [SkipDuplicate("stale")] * 2
            assert isinstance(claim("other"), Claim)


class _Claiming:
    def __init__(self, claims: Claims) -> None:
        self.claims = claims

    def __call__(self, message_id: str, run: int = 0, is_dead: Callable[[Record], bool] = lambda record: False) -> Any:
        return self.claims.claim("key", Request(message_id, run, is_dead), keyed=True, retention=10 * _LONG)

    def finish(self, claim: Claim, decision: Decision) -> None:
        self.claims.finish(claim, decision)

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
