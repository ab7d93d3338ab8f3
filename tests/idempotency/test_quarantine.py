"""A message whose starts never end goes to the dead letters; what merely ran beside it does not."""

from __future__ import annotations

import logging
import threading
import time

import pytest
from dramatiq import group, pipeline
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import StubBackend as RateLimiterBackend
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import Idempotency, Timeout
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.idempotency import actions, records
from dramatiq_policies.idempotency import owner as owners
from dramatiq_policies.idempotency.options import crash_counter_name
from dramatiq_policies.stores.memory import MemoryStore

from ..support import Stage


class Crashing:
    """Jobs whose worker died while they ran: what is left of that is a record, and the message once more."""

    def __init__(self, *, certainly=True, lease=60_000, **options):
        self.store = MemoryStore()
        self.stage = Stage(bundle={"idempotency": Idempotency(self.store, lease=lease)})
        self.lease = lease
        self.runs = []

        # An error of the library must not end in a retry, which would succeed.
        @self.stage.actor(max_retries=0, **options)
        def job(number):
            self.runs.append(number)

        self.job = job
        host, pid, place, _ = owners.this_process().rsplit(":", 3)
        # An earlier process with this pid, or one in another container.
        self.owner = f"{host}:{pid}:{place}:1" if certainly else f"{host}:{pid}:elsewhere:1"

    def began(self, message, starts, *, key=None):
        name = crash_counter_name(message.message_id) if key is None else f"job\0{key}"
        record = records.Record(records.RUNNING, message.message_id, 0, self.owner, "1", 0, starts, 1_000_000)
        self.store.put(name, record.encode(), 1_000_000 + self.lease)

    def starts(self, message):
        return records.Record.decode(self.store.get(crash_counter_name(message.message_id)).value).starts

    def comes_back(self, message):
        self.stage.broker.enqueue(message.copy(options={"redelivered": True}))
        self.stage.run()
        return self.stage.outcomes()[-1], self.stage.reasons()[-1]


GUARDED = {"idempotency_key": "{number}"}


@pytest.mark.parametrize("options", [GUARDED, {}], ids=["with a key", "without"])
def test_a_message_that_began_three_times_is_dead_and_says_why(options):
    app = Crashing(**options)
    message = app.job.message(7)
    app.began(message, 3, key="7" if options else None)
    assert app.comes_back(message) == ("dead", "crashed")
    assert app.runs == []
    failure = app.stage.failures()[0]
    assert (failure["reason"], failure["exception"]) == ("crashed", "dramatiq_policies.errors.Crashed")
    assert "started 3 times" in failure["message"]


def test_the_run_of_a_quarantined_message_has_ended_and_a_copy_is_stale():
    app = Crashing(**GUARDED)
    message = app.job.message(7)
    app.began(message, 3, key="7")
    assert app.comes_back(message) == ("dead", "crashed")
    assert app.comes_back(message) == ("duplicate", "stale")
    assert len(app.stage.dead) == 1


@pytest.mark.parametrize("options", [GUARDED, {}], ids=["with a key", "without"])
def test_a_quarantined_message_runs_when_it_is_replayed(options):
    app = Crashing(**options)
    message = app.job.message(7)
    app.began(message, 3, key="7" if options else None)
    app.comes_back(message)
    assert app.comes_back(app.stage.dead[0].copy()) == ("succeeded", None)


@pytest.mark.parametrize("options", [GUARDED, {}], ids=["with a key", "without"])
def test_max_crashes_of_none_switches_the_quarantine_off_and_an_actors_own_limit_counts(options):
    app = Crashing(max_crashes=None, **options)
    message = app.job.message(7)
    app.began(message, 50, key="7" if options else None)
    assert app.comes_back(message) == ("succeeded", None)
    app = Crashing(max_crashes=5, **options)
    message = app.job.message(7)
    app.began(message, 4, key="7" if options else None)
    assert app.comes_back(message) == ("succeeded", None)
    app.store.delete("job\x007")
    app.began(message, 5, key="7" if options else None)
    assert app.comes_back(message) == ("dead", "crashed")


@pytest.mark.parametrize(("max_crashes", "starts"), [(1, 2), (2, 2), (3, 3), (5, 5)])
def test_without_a_key_the_start_before_the_first_redelivery_counts_as_one(max_crashes, starts):
    """But a message that comes back once may never have begun: a limit of one grants it one start that is known."""
    app = Crashing(max_crashes=max_crashes)
    message = app.job.message(7)
    began = 1
    name = crash_counter_name(message.message_id)
    put, swap = app.store.put, app.store.swap

    def swap_and_die(key, expected, value, ttl):
        answer = swap(key, expected, value, ttl)
        if key == name and value is not None and answer is None:
            dead = records.Record.decode(value)
            put(key, dead._replace(owner=app.owner).encode(), ttl)
        return answer

    app.store.swap = swap_and_die
    while app.comes_back(message) == ("succeeded", None):
        began += 1
    assert app.stage.reasons()[-1] == "crashed"
    assert began == starts


def test_a_message_that_is_requeued_is_still_one_that_came_back():
    """Where no death is certain, as in another container, it waits out the lease: the next start counts all the same."""
    app = Crashing(certainly=False, lease=300)
    message = app.job.message(7)
    app.began(message, 3)
    assert app.comes_back(message) == ("dead", "crashed")
    assert app.stage.outcomes()[0] == "deferred"
    assert app.runs == []


def test_a_message_on_its_first_delivery_asks_no_store():
    app = Crashing()
    app.job.send(7)
    app.stage.run()
    assert app.store._entries == {}
    assert app.comes_back(app.job.message(8)) == ("succeeded", None)
    assert app.store._entries == {}


def test_the_last_start_is_made_alone():
    app = Crashing()
    entered, go_on = threading.Event(), threading.Event()
    beside = []

    @app.stage.actor()
    def long():
        entered.set()
        assert go_on.wait(10)
        beside.append(list(app.runs))

    message = app.job.message(7)
    app.began(message, 2)
    with app.stage.working(threads=2):
        long.send()
        assert entered.wait(10)
        app.stage.broker.enqueue(message.copy(options={"redelivered": True}))
        exclusive = idempotency_of(app.stage).claims.exclusive
        with exclusive._changed:
            assert exclusive._changed.wait_for(lambda: exclusive._alone is not None, 10)
        go_on.set()
        app.stage.drain()
    assert beside == [[]]
    assert app.runs == [7]


def idempotency_of(stage):
    return next(one for one in stage.broker.middleware if isinstance(one, Idempotency))


def waiting_actors(stage, jobs):
    """Declare an actor with a key and one without. Their jobs meet at ``all_in`` with the test, and wait for ``go_on``."""
    all_in, go_on = threading.Barrier(jobs + 1), threading.Event()

    def wait(number):
        all_in.wait(10)
        assert go_on.wait(10)

    guarded = stage.actor(wait, actor_name="guarded", idempotency_key="{number}")
    return guarded, stage.actor(wait, actor_name="plain"), all_in, go_on


def test_only_the_stuck_job_is_blamed_for_the_end_of_its_process():
    store = MemoryStore()
    stage = Stage(bundle={"idempotency": Idempotency(store), "timeout": Timeout(on_stuck="exit")})
    guarded, plain, all_in, go_on = waiting_actors(stage, jobs=3)

    with stage.working(threads=3):
        stuck, neighbour, other = guarded.send(1), guarded.send(2), plain.send(3)
        all_in.wait(10)
        one = Stuck(stuck.message_id)
        idempotency_of(stage)._uncount_other_jobs(one)
        starts = [
            records.Record.decode(store.get(name).value).starts
            for name in ("guarded\x001", "guarded\x002", crash_counter_name(other.message_id))
        ]
        go_on.set()
        stage.drain()
    assert starts == [1, 0, 0]
    assert neighbour.message_id != stuck.message_id
    # It may begin at once elsewhere: this process is as good as gone.
    found = store.get(crash_counter_name(other.message_id))
    assert found.left <= records.Record.decode(found.value).retention


class Stuck:
    def __init__(self, message_id):
        self.message_id = message_id


def test_no_start_is_uncounted_where_a_stuck_job_is_only_logged():
    store = MemoryStore()
    stage = Stage(bundle={"idempotency": Idempotency(store)})
    seen = []

    @stage.actor(idempotency_key="{number}")
    def guarded(number):
        idempotency_of(stage)._uncount_other_jobs(Stuck("another"))
        seen.append(records.Record.decode(store.get("guarded\x001").value).starts)

    guarded.send(1)
    stage.run()
    assert seen == [1]


# Other behaviour of a worker.


class Evicting(MemoryStore):
    def warnings(self):
        return ["This server may evict keys: an evicted key is a second run."]


def test_a_store_that_may_forget_is_warned_about_when_a_worker_starts(caplog):
    stage = Stage(bundle={"idempotency": Idempotency(Evicting())})
    assert "evict" not in caplog.text
    with stage.working():
        pass
    said = [record for record in caplog.records if "evict" in record.message]
    assert [(record.name, record.levelno) for record in said] == [("dramatiq_policies.alerts", logging.WARNING)]


def test_a_pipeline_goes_on_after_done_when_although_its_result_could_not_be_read(monkeypatch):
    """The message is requeued without a run; it has not ended, and is no stale copy of itself."""
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    told, broken = [], [True]
    get_result = backend.get_result

    def fail_once(*args, **kwargs):
        if broken:
            broken.clear()
            raise ConnectionError("no results")
        return get_result(*args, **kwargs)

    monkeypatch.setattr(backend, "get_result", fail_once)

    @stage.actor(idempotency_key="{number}", done_when=lambda number: True, store_results=True)
    def job(number):
        raise AssertionError

    tell = stage.actor(lambda *args: told.append(args), actor_name="tell")
    pipe = pipeline([job.message(7), tell.message_with_options(args=("ann",), pipe_ignore=True)], broker=stage.broker)
    pipe.run()
    stage.run()
    assert told == [("ann",)]
    assert stage.reasons()[:2] == ["store_down", "done"]


def test_a_job_that_may_have_killed_a_worker_begins_only_once_the_command_has_booted_the_next(monkeypatch):
    """Dramatiq's command waits for ever for a worker process that dies while it says that it has booted."""
    monkeypatch.setattr("dramatiq_policies.middleware.idempotency._BOOTING", 0.3)
    app = Crashing()
    state_of(app.stage.broker).in_command = True
    began = time.monotonic()
    message = app.job.message(7)
    assert app.comes_back(message) == ("succeeded", None)
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("options", [GUARDED, {}], ids=["with a key", "without"])
def test_other_jobs_begin_at_once(monkeypatch, options):
    monkeypatch.setattr("dramatiq_policies.middleware.idempotency._BOOTING", 4.0)
    app = Crashing(**options)
    state_of(app.stage.broker).in_command = True
    began = time.monotonic()
    app.job.send(7)
    app.stage.run()
    assert app.stage.outcomes() == ["succeeded"]
    assert time.monotonic() - began < 4.0


# A worker died while it published a retry, or its results can't be read.


@pytest.mark.parametrize(
    ("due", "delays"),
    [(None, [None]), (20_000, range(10_000, 20_001)), (-5_000, [1])],
    ids=["at once", "later", "over"],
)
def test_a_retry_that_was_being_published_is_published_again_for_when_it_was_due(monkeypatch, due, delays):
    app = Crashing(**GUARDED)
    message = app.job.message(7)
    due = None if due is None else int(time.time() * 1_000) + due
    retry = {"options": {"retries": 1, "mark": "theirs"}, "due": due}
    record = records.Record(records.ENDING, message.message_id, 0, app.owner, "1", 0, 1, 1_000_000, retry=retry)
    app.store.put("job\x007", record.encode(), 1_000_000 + app.lease)
    sent, enqueue = [], app.stage.broker.enqueue

    def watched(message, *, delay=None):
        if message.options.get("mark") == "theirs":
            sent.append((message.message_id, delay))
            delay = None
        return enqueue(message, delay=delay)

    monkeypatch.setattr(app.stage.broker, "enqueue", watched)
    app.stage.broker.enqueue(message.copy(options={"redelivered": True}))
    app.stage.run()
    (handed_on, delay), *more = sent
    assert (handed_on, more) == (message.message_id, [])
    assert delay in delays
    assert (app.stage.outcomes()[0], app.stage.reasons()[0]) == ("duplicate", "stale")
    assert app.runs == [7]


def test_a_duplicate_is_done_with_though_its_result_can_not_be_settled(caplog):
    class Full(StubBackend):
        def _store(self, message_key, result, ttl):
            raise ConnectionError("no room")

    stage = Stage(middleware=[Results(backend=Full())])
    stage.actor(lambda: None, actor_name="job", done_when=lambda: True, store_results=True).send()
    stage.run()
    assert stage.outcomes() == ["duplicate"]
    assert "No result could be stored" in caplog.text


def test_a_message_ended_by_done_when_keeps_the_failure_stored_by_an_earlier_run():
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    done = []

    @stage.actor(store_results=True, max_retries=0, done_when=lambda: bool(done))
    def job():
        done.append(True)
        raise ValueError("no such order")

    message = job.send()
    stage.run()
    stage.broker.enqueue(message)
    stage.run()
    assert stage.reasons()[1:] == ["done"]
    with pytest.raises(ResultFailure, match="no such order"):
        backend.get_result(message)


def test_a_duplicate_of_an_actor_whose_next_steps_take_no_result_needs_none():
    stage = Stage()
    told = []
    ship = stage.actor(lambda number: None, actor_name="ship", idempotency_key="{number}", pipe_ignore=True)
    tell = stage.actor(lambda who: told.append(who), actor_name="tell")  # noqa: PLW0108
    for who in ("ann", "bob"):
        pipeline([ship.message(7), tell.message(who)], broker=stage.broker).run()
    stage.run()
    assert sorted(told) == ["ann", "bob"]
    assert stage.dead == []


def test_a_duplicate_that_is_delivered_twice_counts_in_its_group_once(monkeypatch):
    stage = Stage(middleware=[GroupCallbacks(RateLimiterBackend())])
    happened = []

    @stage.actor(idempotency_key="{number}")
    def ship(number):
        happened.append(number)

    tell = stage.actor(lambda: happened.append("told"), actor_name="tell")
    enqueue = stage.broker.enqueue

    def enqueue_member_twice(message, *, delay=None):
        if message.args == (7,) and "group_completion_uuid" in message.options:
            enqueue(message.copy(), delay=delay)
        return enqueue(message, delay=delay)

    ship.send(7)
    monkeypatch.setattr(stage.broker, "enqueue", enqueue_member_twice)
    members = group([ship.message(7), ship.message(8)], broker=stage.broker)
    members.add_completion_callback(tell.message())
    members.run()
    stage.run()
    assert stage.outcomes("ship") == ["succeeded", "duplicate", "duplicate", "succeeded"]
    assert happened == [7, 8, "told"]


def test_a_redelivery_without_a_key_runs_while_the_store_can_not_count_its_start(monkeypatch, caplog):
    def fail(*args):
        raise ConnectionError("no store")

    app = Crashing()
    monkeypatch.setattr(app.store, "swap", fail)
    assert app.comes_back(app.job.message(7)) == ("succeeded", None)
    assert app.runs == [7]
    assert "without a claim" not in caplog.text


# Proof: a start is made alone, or it proves nothing.


def long_beside(app):
    entered, go_on = threading.Event(), threading.Event()

    @app.stage.actor()
    def long():
        entered.set()
        assert go_on.wait(30)

    return long, entered, go_on


@pytest.mark.parametrize("options", [GUARDED, {}], ids=["with a key", "without"])
def test_a_last_start_is_requeued_while_another_job_runs_and_made_alone_then(monkeypatch, options):
    monkeypatch.setattr("dramatiq_policies.idempotency.exclusive._WAIT_FOR_OTHERS", 0.01)
    monkeypatch.setattr("dramatiq_policies.idempotency.contention._FIRST_WAIT", 20)
    app = Crashing(**options)
    long, entered, go_on = long_beside(app)
    message = app.job.message(7)
    app.began(message, 2, key="7" if options else None)
    with app.stage.working(threads=2):
        long.send()
        assert entered.wait(10)
        app.stage.broker.enqueue(message.copy(options={"redelivered": True}))
        app.stage.collected.wait_for(lambda events: len(events) >= 2)
        assert app.runs == []
        go_on.set()
        app.stage.drain()
    assert app.runs == [7]
    assert {event.reason for event in app.stage.events if event.outcome == "deferred"} == {"running"}
    assert app.stage.outcomes("job")[-1] == "succeeded"


def test_a_last_start_beside_a_job_that_never_ends_is_no_proof(monkeypatch):
    monkeypatch.setattr("dramatiq_policies.idempotency.exclusive._WAIT_FOR_OTHERS", 0.01)
    monkeypatch.setattr("dramatiq_policies.idempotency.contention._FIRST_WAIT", 20)
    monkeypatch.setattr("dramatiq_policies.idempotency.guard._ALONE_AFTER", 2)
    app = Crashing(**GUARDED)
    long, entered, go_on = long_beside(app)
    seen = []
    app.runs = Watching(lambda: seen.append(records.Record.decode(app.store.get("job\x007").value)))
    message = app.job.message(7)
    app.began(message, 2, key="7")
    with app.stage.working(threads=2):
        long.send()
        assert entered.wait(10)
        app.stage.broker.enqueue(message.copy(options={"redelivered": True}))
        app.stage.collected.wait_for(lambda events: any(event.outcome == "succeeded" for event in events))
        go_on.set()
        app.stage.drain()
    assert [(record.starts, record.beside) for record in seen] == [(3, True)]
    assert app.stage.outcomes("job") == ["deferred", "deferred", "succeeded"]


class Watching(list):
    def __init__(self, watch):
        self.watch = watch

    def append(self, item):
        super().append(item)
        self.watch()


def test_a_last_start_is_exposed_before_another_job_begins_beside_it(monkeypatch):
    monkeypatch.setattr("dramatiq_policies.idempotency.exclusive._ALONE_FOR", 0.05)
    app = Crashing(**GUARDED)
    alone, go_on = threading.Event(), threading.Event()
    seen = []

    def look():
        return records.Record.decode(app.store.get("job\x007").value).beside

    def run_alone():
        seen.append(look())
        alone.set()
        assert go_on.wait(30)

    app.runs = Watching(run_alone)

    @app.stage.actor()
    def other():
        seen.append(look())
        go_on.set()

    message = app.job.message(7)
    app.began(message, 2, key="7")
    with app.stage.working(threads=2):
        app.stage.broker.enqueue(message.copy(options={"redelivered": True}))
        assert alone.wait(10)
        other.send()
        app.stage.drain()
    assert seen == [False, True]
    assert app.stage.outcomes("job") == ["succeeded"]


# A worker that shuts down may be killed before its jobs end.


def test_the_jobs_that_run_when_a_worker_begins_to_shut_down_have_not_crashed():
    store = MemoryStore()
    stage = Stage(bundle={"idempotency": Idempotency(store)})
    guarded, plain, all_in, go_on = waiting_actors(stage, jobs=2)

    with stage.working(threads=2):
        guarded.send(1)
        other = plain.send(2)
        all_in.wait(10)
        idempotency = idempotency_of(stage)
        for _ in range(2):  # Several workers of a process may stop.
            idempotency.before_worker_shutdown(stage.broker, None)
        found = [
            records.Record.decode(store.get(name).value)
            for name in ("guarded\x001", crash_counter_name(other.message_id))
        ]
        go_on.set()
        stage.drain()
    assert [(record.starts, record.beside) for record in found] == [(0, True)] * 2
    assert stage.outcomes() == ["succeeded"] * 2
    assert records.Record.decode(store.get("guarded\x001").value).state == "completed"


def test_a_job_that_is_claimed_while_the_worker_shuts_down_has_not_crashed_either():
    store = MemoryStore()
    stage = Stage(bundle={"idempotency": Idempotency(store)})
    seen = []

    @stage.actor(idempotency_key="{number}")
    def guarded(number):
        seen.append(records.Record.decode(store.get("guarded\x001").value).starts)

    with stage.working():
        idempotency_of(stage).before_worker_shutdown(stage.broker, None)
        guarded.send(1)
        stage.drain()
    assert seen == [0]


def test_a_retry_of_a_job_that_went_on_through_the_shutdown_is_counted_from_the_beginning():
    store = MemoryStore()
    stage = Stage(bundle={"idempotency": Idempotency(store)})
    starts = []

    @stage.actor(idempotency_key="{number}", min_backoff=1, max_retries=1)
    def guarded(number):
        starts.append(records.Record.decode(store.get("guarded\x001").value).starts)
        if len(starts) == 1:
            idempotency_of(stage).before_worker_shutdown(stage.broker, None)
            idempotency_of(stage).claims.stopping = False
            raise ValueError

    guarded.send(1)
    stage.run()
    assert starts == [1, 1]
    assert stage.outcomes() == ["retried", "succeeded"]


def test_an_answer_that_the_guard_does_not_know_never_lets_a_job_run(monkeypatch):
    app = Crashing(**GUARDED)
    monkeypatch.setattr("dramatiq_policies.idempotency.claims.Claims.claim", lambda *args, **options: actions.Start(1))
    app.job.send(7)
    app.stage.run()
    assert app.stage.outcomes() == ["dead"]
    assert app.runs == []
