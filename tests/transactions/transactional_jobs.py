"""An application with transactional jobs, sync or async, on a StubBroker and any database; and what the jobs must do there."""

from __future__ import annotations

import asyncio
import inspect
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import pytest
import sqlalchemy as sa
from dramatiq import Message, group, pipeline
from dramatiq.middleware import AsyncIO, CurrentMessage, GroupCallbacks
from dramatiq.rate_limits.backends import StubBackend
from dramatiq.results import ResultMissing, Results
from dramatiq.results.backends import StubBackend as StubResults
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from dramatiq_policies import (
    ConfigurationError,
    Discard,
    Idempotency,
    RetryPolicy,
    Snooze,
    TimeoutExceeded,
    current_job,
)
from dramatiq_policies.idempotency import guard, records
from dramatiq_policies.sql import SqlOutbox, SqlStore
from dramatiq_policies.testing import drain, store_down

from ..support import Stage

ONCE = RetryPolicy(attempts=1)
TWICE = RetryPolicy(attempts=2, wait=1)


class Base(DeclarativeBase):
    pass


class Payment(Base):
    __tablename__ = "payments"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    order: Mapped[int] = mapped_column(unique=False)


class Receipt(Base):
    __tablename__ = "receipts"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Shop:
    """An application whose jobs pay orders.

    Parameters:
      sync: A sync engine of the database, for the test itself.
      engine: The engine of the application, sync or async.
    """

    def __init__(self, sync, engine, *, lease=60_000):
        self.sync = sync
        self.engine = engine
        self.is_async = isinstance(engine, AsyncEngine)
        self.store = SqlStore(engine)
        self.outbox = SqlOutbox(engine)
        self.idempotency = Idempotency(self.store, lease=lease)
        bundle = {"outbox": self.outbox, "idempotency": self.idempotency}
        results = StubResults()
        middleware = [AsyncIO(), CurrentMessage(), GroupCallbacks(StubBackend()), Results(backend=results)]
        self.stage = Stage(middleware=middleware, bundle=bundle)
        self.results = results
        self.broker = self.stage.broker
        self.done = []
        #: How many connections of the engine are in use.
        self.checked_out = 0
        pool = self.engine.pool
        sa.event.listen(pool, "checkout", lambda *args: self._count(1))
        sa.event.listen(pool, "checkin", lambda *args: self._count(-1))

        @self.stage.actor(queue_name="done")
        def done(*args):
            self.done.append(args)

        self.note = done

    def actor(self, body, *, name="pay", idempotency_key="{order}", **options):
        """Declare a transactional actor.

        Parameters:
          body: The job, as a coroutine function of a `Job` and the order. In a sync job it waits for nothing.
        """
        if self.is_async:

            async def pay(order, *results):
                return await body(Job(), order)

        else:

            def pay(order, *results):
                return run_in_steps(body(Job(), order))

        options.setdefault("retry_on", {RuntimeError: ONCE, IntegrityError: ONCE, ConfigurationError: ONCE})
        options = {"transactional": True, "idempotency_key": idempotency_key, **options}
        return self.stage.actor(pay, actor_name=name, **options)

    def drain(self):
        return drain(self.broker)

    def payments(self):
        with Session(self.sync) as session:
            return sorted(session.scalars(sa.select(Payment.order)))

    def queued(self, queue):
        return [Message.decode(body).args for body in self.broker.queues[queue].queue]

    def pending(self):
        return self.outbox.database.run(self.outbox.rows.stats).pending

    def outcomes(self, actor="pay"):
        return [(event.outcome.value, event.reason) for event in self.stage.collected.events if event.actor == actor]

    def _count(self, more):
        self.checked_out += more

    def claim(self):
        (claim,) = self.idempotency.claims.leases._held.values()
        return claim

    def take_over(self, **changes):
        """Write the claim of another process over the running job's, as if its lease had ended. Before the job writes.

        Returns a function that ends the other run without success.
        """
        claim = self.claim()
        theirs = claim.record._replace(owner="elsewhere:1:place:1", token="1", **changes).encode()
        assert self.store.swap(claim.name, claim.value, theirs, 10**9) is None
        return lambda: self.store.swap(claim.name, theirs, None, 1)

    @contextmanager
    def failing_commit(self, *, after, calls_fail=0, error=None):
        """Lose the connection at the next COMMIT of a job: before it, or after it, with its reply.

        Parameters:
          calls_fail: How many of the next calls of the store fail.
          error: The error of the COMMIT; a lost connection by default.
        """
        dialect, left, outage = self.engine.dialect, [1], ExitStack()
        do_commit = dialect.do_commit

        def lose(connection):
            if not any(claim.committing for claim in self.idempotency.claims.leases._held.values()) or not left:
                return do_commit(connection)
            left.clear()
            if after:
                do_commit(connection)
            if calls_fail:
                outage.enter_context(store_down(self.broker, times=calls_fail))
            raise error or ConnectionResetError("lost")

        dialect.do_commit = lose
        try:
            with outage:
                yield
        finally:
            del dialect.do_commit
        assert not left

    def close(self):
        self.idempotency.claims.close()
        self.store.database.close()
        self.outbox.database.close()


class Job:
    """The operations of a job on its session, sync or async."""

    def __init__(self):
        self.session = current_job().session

    async def call(self, name, *args):
        return await self.on(self.session, name, *args)

    async def on(self, thing, name, *args):
        answer = getattr(thing, name)(*args)
        return await answer if inspect.isawaitable(answer) else answer

    async def sleep(self, seconds):
        if isinstance(self.session, AsyncSession):
            await asyncio.sleep(seconds)
        else:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.01)  # noqa: ASYNC251 - a sync job

    async def add(self, *rows):
        self.session.add_all(rows)
        await self.call("flush")


def run_in_steps(coroutine):
    """Run a coroutine that waits for nothing that is not done."""
    try:
        while True:
            coroutine.send(None)
    except StopIteration as stop:
        return stop.value


class TransactionalJobs:
    """Runs on each database; a subclass has the fixture ``shop``."""

    def test_the_effect_the_completion_and_the_messages_are_there_together(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            shop.note.send(order)
            assert shop.queued("done") == []

        pay = shop.actor(body)
        pay.send(7)
        shop.drain()
        assert (shop.payments(), shop.done) == ([7], [(7,)])
        assert Idempotency.state(pay, 7).state == "completed"
        assert shop.outcomes() == [("succeeded", None)]
        assert shop.pending() == 0

    def test_an_error_leaves_nothing(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            shop.note.send(order)
            raise RuntimeError

        pay = shop.actor(body)
        pay.send(7)
        shop.drain()
        assert (shop.payments(), shop.done, shop.pending()) == ([], [], 0)
        assert shop.outcomes() == [("dead", "exhausted")]
        assert Idempotency.state(pay, 7).state == "none"

    def test_a_failed_run_is_retried_in_a_new_transaction(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            shop.note.send(current_job().attempt)
            if current_job().attempt == 1:
                raise RuntimeError

        shop.actor(body, retry_on={RuntimeError: TWICE}).send(7)
        shop.drain()
        assert (shop.payments(), shop.done) == ([7], [(2,)])
        assert shop.outcomes() == [("retried", None), ("succeeded", None)]

    @pytest.mark.parametrize(
        ("error", "outcome"), [(Discard(), ("discarded", None)), (Snooze(1_000), ("deferred", "snoozed"))]
    )
    def test_a_verdict_rolls_back(self, shop, error, outcome):
        runs = []

        async def body(job, order):
            runs.append(order)
            await job.add(Payment(order=order))
            if len(runs) == 1:
                raise error

        shop.actor(body).send(7)
        shop.drain()
        assert shop.outcomes()[0] == outcome
        assert shop.payments() == ([] if len(runs) == 1 else [7])

    def test_an_error_at_the_flush_after_the_job_is_the_jobs(self, shop):
        async def body(job, order):
            job.session.add_all([Receipt(number=1), Payment(order=order)])
            shop.note.send(order)

        shop.actor(body, retry_on={IntegrityError: TWICE})
        with Session(shop.sync) as session, session.begin():
            session.add(Receipt(number=1))
        shop.broker.actors["pay"].send(7)
        shop.drain()
        assert (shop.payments(), shop.done) == ([], [])
        assert shop.outcomes() == [("retried", None), ("dead", "exhausted")]

    def test_a_duplicate_is_skipped(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))

        pay = shop.actor(body)
        pay.send(7)
        pay.send(7)
        shop.drain()
        assert shop.payments() == [7]
        assert shop.outcomes() == [("succeeded", None), ("duplicate", "completed")]

    def test_a_duplicate_with_other_arguments_is_logged(self, shop, caplog):
        async def body(job, order):
            job.session.add(Payment(order=order))

        pay = shop.actor(body)
        pay.send(7)
        pay.send(7, "another")
        shop.drain()
        assert shop.outcomes() == [("succeeded", None), ("duplicate", "completed")]
        assert "but other arguments" in caplog.text

    def test_a_run_whose_key_was_taken_over_leaves_nothing_and_is_stale(self, shop):
        async def body(job, order):
            shop.take_over()
            await job.add(Payment(order=order))
            shop.note.send(order)

        pay = shop.actor(body)
        pay.send(7)
        shop.drain()
        assert (shop.payments(), shop.done, shop.pending()) == ([], [], 0)
        assert shop.outcomes() == [("duplicate", "stale")]
        assert Idempotency.state(pay, 7).owner == "elsewhere:1:place:1"

    @pytest.mark.parametrize("error", [RuntimeError(), Discard(), Snooze(1_000)])
    def test_a_run_that_fails_after_its_key_was_taken_over_is_stale(self, shop, error):
        async def body(job, order):
            shop.take_over()
            raise error

        shop.actor(body).send(7)
        shop.drain()
        assert shop.outcomes() == [("duplicate", "stale")]

    def test_a_failed_run_goes_by_the_rules_while_the_store_is_down(self, shop):
        outages = ExitStack()

        async def body(job, order):
            outages.enter_context(store_down(shop.broker, times=1))
            raise RuntimeError

        shop.actor(body).send(7)
        with outages:
            shop.drain()
        assert shop.outcomes() == [("dead", "exhausted")]

    @pytest.mark.parametrize("ours", [True, False])
    def test_a_run_whose_key_another_message_completed_still_moves_its_pipeline_on(self, shop, ours):
        async def body(job, order):
            claim = shop.claim()
            message_id = claim.record.message_id if ours else "another"
            theirs = records.completed_by(message_id, claim.record.args)
            assert shop.store.swap(claim.name, claim.value, theirs, 10**9) is None
            await job.add(Payment(order=order))

        pay = shop.actor(body)
        options = {"pipe_ignore": True}
        steps = [pay.message(7), shop.note.message_with_options(args=("next",), **options)]
        pipeline(steps, broker=shop.broker).run()
        shop.drain()
        assert shop.payments() == []
        # A redelivery of the same message has sent the next step in its own transaction.
        again = [] if ours else [("duplicate", "completed")]
        assert shop.outcomes() == [("duplicate", "stale"), *again]
        assert shop.done == ([] if ours else [("next",)])

    def test_a_run_whose_key_another_message_took_runs_again_if_the_other_fails(self, shop):
        ends = []

        async def body(job, order):
            if not ends:
                ends.append(shop.take_over(message_id="another"))
            await job.add(Payment(order=order))

        shop.actor(body).send(7)
        shop.stage.actor(lambda: [end() for end in ends], actor_name="fails").send()
        shop.drain()
        assert shop.outcomes() == [("duplicate", "stale"), ("succeeded", None)]
        assert shop.payments() == [7]

    def test_the_lease_is_renewed_while_the_job_runs(self, shop):
        async def body(job, order):
            await job.call("execute", sa.select(Payment))  # A snapshot, where there are any.
            before = shop.store.get(shop.claim().name).left
            shop.idempotency.claims.leases.renew()
            assert shop.store.get(shop.claim().name).left >= before - 1_000
            await job.add(Payment(order=order))

        shop.actor(body).send(7)
        shop.drain()
        assert (shop.payments(), shop.outcomes()) == ([7], [("succeeded", None)])

    def test_a_run_whose_key_was_forgotten_completes_the_key(self, shop):
        async def body(job, order):
            assert Idempotency.forget(pay, 7)
            await job.add(Payment(order=order))

        pay = shop.actor(body)
        pay.send(7)
        shop.drain()
        assert shop.payments() == [7]
        assert Idempotency.state(pay, 7).state == "completed"

    def test_a_run_whose_claim_was_rewritten_without_a_reply_is_still_its_own(self, shop):
        async def body(job, order):
            claim = shop.claim()
            record, value = claim.record, claim.value
            assert shop.idempotency.claims.rewrite(claim, beside=not record.beside)
            assert claim.value != value
            claim.record, claim.value = record, value
            await job.add(Payment(order=order))

        pay = shop.actor(body)
        pay.send(7)
        shop.drain()
        assert (shop.payments(), shop.outcomes()) == ([7], [("succeeded", None)])

    @pytest.mark.parametrize("swallowed", [False, True])
    @pytest.mark.parametrize("by", ["session", "connection"])
    def test_a_commit_by_the_job_is_refused(self, shop, by, swallowed):
        async def body(job, order):
            await job.add(Payment(order=order))
            shop.note.send(order)
            if by == "session":
                work = job.call("commit")
            else:
                connection = await job.call("connection")
                work = job.on(connection, "commit")
            if not swallowed:
                await work
            else:
                with suppress(ConfigurationError):
                    await work

        shop.actor(body).send(7)
        shop.drain()
        assert (shop.payments(), shop.done, shop.pending()) == ([], [], 0)
        (event,) = [event for event in shop.stage.events if event.actor == "pay"]
        assert event.outcome.value == "dead"
        assert "must not commit" in str(event.exception)

    def test_the_job_may_roll_back_and_go_on(self, shop):
        async def body(job, order):
            await job.add(Payment(order=1))
            shop.note.send("gone")
            await job.call("rollback")
            await job.add(Payment(order=order))
            shop.note.send("kept")

        shop.actor(body).send(7)
        shop.drain()
        assert (shop.payments(), shop.done) == ([7], [("kept",)])

    def test_a_close_by_the_job_is_refused_because_the_effect_would_be_lost_and_the_key_completed(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            shop.note.send(order)
            await job.call("close")

        pay = shop.actor(body)
        pay.send(7)
        shop.drain()
        assert (shop.payments(), shop.done, shop.pending()) == ([], [], 0)
        (event,) = [event for event in shop.stage.events if event.actor == "pay"]
        assert "must not close its session" in str(event.exception)
        assert Idempotency.state(pay, 7).state != "completed"

    def test_an_error_of_the_job_counts_although_a_with_block_has_closed_the_session(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            await job.call("close")
            raise IndexError("of the job")

        shop.actor(body, discard_on=IndexError).send(7)
        shop.drain()
        assert (shop.payments(), shop.outcomes()) == ([], [("discarded", None)])

    def test_the_job_may_close_its_session_after_a_rollback_and_go_on(self, shop):
        async def body(job, order):
            await job.add(Payment(order=1))
            await job.call("rollback")
            await job.call("close")
            await job.add(Payment(order=order))

        shop.actor(body).send(7)
        shop.drain()
        assert shop.payments() == [7]

    def test_the_job_may_have_savepoints(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            for number in (1, 2):
                savepoint = await job.call("begin_nested")
                await job.add(Payment(order=number))
                shop.note.send(number)
                await job.on(savepoint, "rollback" if number == 1 else "commit")

        shop.actor(body).send(7)
        shop.drain()
        assert (shop.payments(), shop.done) == ([2, 7], [(2,)])

    def test_an_error_after_a_savepoint_leaves_nothing_of_the_savepoint(self, shop):
        async def body(job, order):
            savepoint = await job.call("begin_nested")
            await job.add(Payment(order=order))
            await job.on(savepoint, "commit")
            raise RuntimeError

        shop.actor(body).send(7)
        shop.drain()
        assert (shop.payments(), shop.outcomes()) == ([], [("dead", "exhausted")])

    def test_a_job_without_any_statement_completes_its_key(self, shop):
        async def body(job, order):
            pass

        pay = shop.actor(body)
        pay.send(7)
        shop.drain()
        assert Idempotency.state(pay, 7).state == "completed"

    def test_the_next_step_of_a_pipeline_is_sent_once_with_the_result(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            return {"paid": order}

        pay = shop.actor(body, store_results=True)
        pipeline([pay.message(7), shop.note.message("next")], broker=shop.broker).run()
        shop.drain()
        assert (shop.payments(), shop.done) == ([7], [("next", {"paid": 7})])

    def test_a_group_completes_once_all_members_are_committed(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))

        pay = shop.actor(body)
        members = group([pay.message(number) for number in range(3)], broker=shop.broker)
        members.add_completion_callback(shop.note.message("all"))
        members.run()
        shop.drain()
        assert (shop.payments(), shop.done) == ([0, 1, 2], [("all",)])

    def test_a_member_of_a_group_may_change_its_arguments_to_values_that_cannot_be_sent(self, shop):
        async def body(job, order):
            order["number"] = object()
            await job.add(Payment(order=1))

        pay = shop.actor(body, idempotency_key=None, idempotent=True)
        members = group([pay.message({"number": number}) for number in range(2)], broker=shop.broker)
        members.add_completion_callback(shop.note.message("all"))
        members.run()
        shop.drain()
        assert (shop.payments(), shop.done) == ([1, 1], [("all",)])

    def test_on_success_is_sent_once(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            return "paid"

        pay = shop.actor(body, on_success="done")
        message = pay.send(7)
        shop.drain()
        assert [args[1] for args in shop.done] == ["paid"]
        assert shop.done[0][0]["message_id"] == message.message_id

    def test_the_result_is_stored(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            return "paid"

        message = shop.actor(body, store_results=True).send(7)
        shop.drain()
        assert shop.results.get_result(message) == "paid"

    @pytest.mark.parametrize("comes", [True, False])
    def test_a_duplicate_waits_for_the_result_that_is_stored_after_the_commit(self, shop, monkeypatch, comes):
        async def body(job, order):
            await job.add(Payment(order=order))
            return "paid"

        pay = shop.actor(body, store_results=True)
        pay.send(7)
        shop.drain()
        get, missing = shop.results.get_result, [1, 2]

        def get_result(message):
            if missing:
                missing.pop()
                raise ResultMissing(message)
            return get(message)

        monkeypatch.setattr(shop.results, "get_result", get_result)
        if not comes:
            monkeypatch.setattr(guard, "_RESULT_COMES_WITHIN", 0)
        pipeline([pay.message(7), shop.note.message("next")], broker=shop.broker).run()
        shop.drain()
        assert shop.outcomes() == [
            ("succeeded", None),
            *([("deferred", "running")] * 2 if comes else []),
            ("duplicate", "completed") if comes else ("dead", "no_result"),
        ]
        assert shop.done == ([("next", "paid")] if comes else [])

    def test_a_duplicate_does_not_wait_for_a_result_because_the_ttl_was_longer_before(self, shop):
        async def body(job, order):
            claim = shop.claim()
            claim.retention *= 2
            await job.add(Payment(order=order))

        pay = shop.actor(body, store_results=False)
        pay.send(7)
        shop.drain()
        message = pay.message_with_options(args=(7,), store_results=True)
        pipeline([message, shop.note.message("next")], broker=shop.broker).run()
        shop.drain()
        assert shop.outcomes() == [("succeeded", None), ("dead", "no_result")]

    def test_a_result_that_cannot_be_sent_to_the_next_step_leaves_nothing(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            return object()

        pay = shop.actor(body, retry_on={TypeError: ONCE, Exception: ONCE})
        pipeline([pay.message(7), shop.note.message("next")], broker=shop.broker).run()
        shop.drain()
        assert (shop.payments(), shop.done, shop.pending()) == ([], [], 0)
        assert shop.outcomes() == [("dead", "exhausted")]

    def test_done_when_skips_the_job_in_its_transaction(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))

        shop.actor(body, done_when=lambda order, *results: order == 7)
        shop.broker.actors["pay"].send(7)
        shop.broker.actors["pay"].send(8)
        shop.drain()
        assert shop.payments() == [8]
        assert shop.outcomes() == [("duplicate", "done"), ("succeeded", None)]

    def test_a_message_waits_while_the_store_is_down(self, shop, monkeypatch):
        async def body(job, order):
            await job.add(Payment(order=order))

        shop.idempotency.guard.run_without_store = True
        shop.actor(body).send(7)
        with store_down(shop.broker, times=1):
            shop.drain()
        assert shop.payments() == [7]
        assert shop.outcomes() == [("deferred", "store_down"), ("succeeded", None)]

    def test_a_timeout_rolls_back(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            shop.note.send(order)
            await job.sleep(5)

        shop.actor(body, timeout=300, retry_on={TimeoutExceeded: ONCE}).send(7)
        shop.stage.run()
        assert (shop.payments(), shop.done, shop.pending()) == ([], [], 0)
        assert shop.outcomes() == [("dead", "exhausted")]

    def test_a_timeout_that_the_job_handles_is_an_error(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            shop.note.send(order)
            try:
                await job.sleep(5)
            except BaseException:
                pass

        shop.actor(body, timeout=300, retry_on={TimeoutExceeded: ONCE}).send(7)
        shop.stage.run()
        assert (shop.payments(), shop.done, shop.pending()) == ([], [], 0)
        assert shop.outcomes() == [("dead", "exhausted")]

    def test_other_jobs_of_the_broker_have_no_session(self, shop):
        def plain():
            with pytest.raises(ConfigurationError, match="declare the actor with transactional=True"):
                _ = current_job().session
            plain_runs.append(1)

        plain_runs = []

        async def body(job, order):
            pass

        shop.actor(body)
        shop.stage.actor(plain).send()
        shop.drain()
        assert plain_runs == [1]

    def test_a_lost_reply_to_the_commit_is_looked_up(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            shop.note.send(order)

        pay = shop.actor(body, store_results=True)
        message = pay.send(7)
        with shop.failing_commit(after=True):
            shop.drain()
        assert (shop.payments(), shop.outcomes()) == ([7], [("succeeded", None)])
        assert shop.results.get_result(message) is None
        assert shop.pending() == 1  # Its relay's, once the lease of the row has ended.

    def test_a_listener_of_the_application_that_fails_after_the_commit_does_not_fail_the_job(self, shop):
        def fails(session):
            if shop.idempotency.claims.leases._held:
                raise RuntimeError("of the listener")

        async def body(job, order):
            await job.add(Payment(order=order))

        shop.actor(body, max_retries=0).send(7)
        event.listen(Session, "after_commit", fails)
        try:
            shop.drain()
        finally:
            event.remove(Session, "after_commit", fails)
        assert (shop.payments(), shop.outcomes()) == ([7], [("succeeded", None)])

    def test_a_listener_sends_before_the_commit_in_the_transaction_and_after_the_commit_at_once(self, shop):
        sent = []

        def send(name, *_):
            if shop.idempotency.claims.leases._held:
                shop.note.send(name)
                sent.append((name, len(shop.queued("done"))))

        async def body(job, order):
            await job.add(Payment(order=order))

        shop.actor(body, max_retries=0).send(7)
        listeners = {name: partial(send, name) for name in ("before_commit", "after_commit")}
        for name, listener in listeners.items():
            event.listen(Session, name, listener)
        try:
            shop.drain()
        finally:
            for name, listener in listeners.items():
                event.remove(Session, name, listener)
        assert sent == [("before_commit", 0), ("after_commit", 1)]
        assert (shop.payments(), shop.outcomes()) == ([7], [("succeeded", None)])
        assert sorted(shop.done) == [("after_commit",), ("before_commit",)]

    def test_a_connection_that_is_lost_before_the_commit_leaves_nothing(self, shop):
        async def body(job, order):
            await job.add(Payment(order=order))
            shop.note.send(order)

        shop.actor(body, retry_on={ConnectionResetError: TWICE}).send(7)
        with shop.failing_commit(after=False):
            shop.drain()
        assert (shop.payments(), shop.done) == ([7], [(7,)])
        assert shop.outcomes() == [("retried", None), ("succeeded", None)]

    @pytest.mark.parametrize("after", [False, True])
    def test_a_run_whose_commit_is_unknown_while_the_database_is_away_waits_and_uses_no_attempt(self, shop, after):
        async def body(job, order):
            await job.add(Payment(order=order))

        shop.actor(body, retry_on={ConnectionResetError: ONCE}).send(7)
        # The calls: the register after the lost commit, and the release of the claim.
        with shop.failing_commit(after=after, calls_fail=2):
            shop.drain()
        assert shop.payments() == [7]
        assert shop.outcomes() == [
            ("deferred", "store_down"),
            ("duplicate", "completed") if after else ("succeeded", None),
        ]

    def test_no_connection_of_the_engine_is_left_checked_out(self, shop):
        async def body(job, order):
            if order == 2:
                shop.take_over()
            await job.add(Payment(order=order))
            if order == 1:
                raise RuntimeError

        pay = shop.actor(body)
        for number in range(3):
            pay.send(number)
        shop.drain()
        assert shop.payments() == [0]
        assert shop.checked_out == 0
