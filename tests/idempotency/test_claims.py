"""Claims through a store in memory whose clock the test moves: takeovers, renewals, and what is written late."""

from __future__ import annotations

import os
import signal
import threading
import time

import dramatiq
import pytest

from dramatiq_policies import Outcome
from dramatiq_policies.delivery.decision import Decision
from dramatiq_policies.delivery.outgoing import OutgoingMessage
from dramatiq_policies.idempotency import actions, records, tokens
from dramatiq_policies.idempotency import claims as claims_module
from dramatiq_policies.idempotency import owner as owners
from dramatiq_policies.idempotency.actions import Request, SkipDuplicate, Start, WaitForOwner
from dramatiq_policies.idempotency.claim import Claim, QuarantinedClaim
from dramatiq_policies.idempotency.claims import Claims
from dramatiq_policies.idempotency.options import crash_counter_name, register_of
from dramatiq_policies.idempotency.records import Record
from dramatiq_policies.idempotency.store_client import StoreDown
from dramatiq_policies.idempotency.tokens import is_dead
from dramatiq_policies.stores import Entry
from dramatiq_policies.stores.memory import MemoryStore

LEASE, KEEP = 60_000, 1_000_000
SUCCEEDED = Decision(Outcome.SUCCEEDED)
DEAD = Decision(Outcome.DEAD, "exhausted")
RETRIED = Decision(Outcome.RETRIED, delay_ms=5_000)


class Counting(MemoryStore):
    """Counts round trips, is down when asked to, and has a clock that the test moves."""

    def __init__(self):
        self.now = 0.0
        super().__init__(clock=lambda: self.now)
        self.down = False
        self.renewals = []

    def _find(self, key):
        if self.down:
            raise ConnectionError("no store")
        return super()._find(key)

    def _write(self, key, value, ttl):
        if self.down:
            raise ConnectionError("no store")
        super()._write(key, value, ttl)

    def renew(self, renewals):
        self.renewals.append([renewal.key for renewal in renewals])
        return super().renew(renewals)

    def record(self, name):
        return Record.decode(self.get(name).value)


@pytest.fixture
def store():
    return Counting()


@pytest.fixture
def claims(store):
    made = Claims(store, LEASE)
    yield made
    store.down = False
    made.close()


@pytest.fixture
def slept(monkeypatch):
    """For how many seconds each pause lasted; none takes any time."""
    pauses = []
    monkeypatch.setattr(claims_module.clock, "sleep", pauses.append)
    return pauses


def ask(claims, message_id="m", run=0, *, name="k", dead=is_dead, keyed=True, max_crashes=3, starts=1, alone=False):
    request = Request(message_id, run, dead, max_crashes, starts, alone)
    return claims.claim(name, request, keyed=keyed, retention=KEEP)


def died(record):
    return True


# Taking over.


def test_a_claim_names_this_process_and_is_deferred_to_while_its_lease_lasts(claims, store):
    claim = ask(claims)
    assert isinstance(claim, Claim)
    assert store.record("k").owner == owners.this_process()
    assert ask(claims, "other") == WaitForOwner(LEASE)
    store.now += 59
    assert ask(claims, "other") == WaitForOwner(1_000)


def test_another_message_waits_out_the_lease_even_of_a_dead_owner(claims, store):
    ask(claims)
    assert ask(claims, "other", dead=died) == WaitForOwner(LEASE)
    store.now += 61
    assert isinstance(ask(claims, "other", dead=died), Claim)


def test_the_same_run_takes_over_at_once_only_where_its_owner_is_certainly_dead(claims, store):
    first = ask(claims)
    assert ask(claims) == WaitForOwner(LEASE)
    taken = ask(claims, dead=died)
    assert isinstance(taken, Claim)
    assert store.record("k").starts == 2
    assert taken.value != first.value


def test_the_run_that_was_taken_over_can_write_its_failure_no_more(claims, store):
    first = ask(claims)
    ask(claims, dead=died)
    held = store.get("k").value
    claims.finish(first, DEAD)
    assert store.get("k").value == held


def test_a_run_that_was_taken_over_and_yet_succeeds_completes_the_key(claims, store):
    first = ask(claims)
    ask(claims, dead=died)
    claims.finish(first, SUCCEEDED)
    assert ask(claims) == SkipDuplicate("completed", None)


def test_a_quarantine_leaves_the_claims_of_this_process_alone(claims, store):
    """Tokens are numbers that each process counts for itself: the dead owner's may be that of a run here."""
    running = ask(claims, "runs here", name="other")
    theirs = Record(records.RUNNING, "m", 0, "elsewhere:1:place:1", running.record.token, 0, 3, KEEP)
    store.put("k", theirs.encode(), LEASE + KEEP)
    quarantined = ask(claims, dead=died)
    assert isinstance(quarantined, QuarantinedClaim)
    claims.finish(quarantined.claim, Decision(Outcome.DEAD, "crashed"))
    assert not is_dead(running.record)
    assert ask(claims, "runs here", name="other") == WaitForOwner(LEASE)


def test_two_messages_with_one_key_that_kill_their_workers_by_turns_are_quarantined(claims, store):
    """As where no death is certain: each waits out the other's lease, and takes over."""
    starts, running = 0, ["a", "b"]
    while running and starts < 20:
        answer = ask(claims, running[0])
        if isinstance(answer, Start) and answer.alone:
            answer = ask(claims, running[0], alone=True)
        if isinstance(answer, QuarantinedClaim):
            claims.finish(answer.claim, Decision(Outcome.DEAD, "crashed"))
            running.pop(0)
            continue
        assert isinstance(answer, Claim)
        starts += 1
        claims.drop(answer)  # as if its process had died
        store.now += LEASE / 1_000 + 1
        running.reverse()
    assert running == []
    assert starts <= 7


# Endings.


def test_the_register_after_each_ending_has_the_fields_for_the_next_message(claims, store):
    claims.finish(ask(claims), SUCCEEDED)
    assert store.record("k").state == "completed"
    assert store.get("k").left == KEEP
    store.delete("k")

    claims.finish(ask(claims), RETRIED)
    waiting = store.record("k")
    assert (waiting.state, waiting.ended) == ("waiting", (("m", 0),))
    assert store.get("k").left == 5_000 + LEASE + KEEP
    assert ask(claims, "other") == WaitForOwner(5_000 + LEASE)
    assert ask(claims) == SkipDuplicate("stale")

    claims.finish(ask(claims, run=1), DEAD)
    assert store.record("k").state == "free"
    assert ask(claims) == ask(claims, run=1) == SkipDuplicate("stale")
    assert isinstance(ask(claims, "other"), Claim)


def test_an_interrupted_run_frees_the_key_and_may_begin_again(claims, store):
    claims.finish(ask(claims), Decision(Outcome.INTERRUPTED))
    assert store.get("k").value is None
    assert isinstance(ask(claims), Claim)


def test_a_run_that_was_requeued_unrun_has_not_ended(claims, store):
    """`done_when` said so, and then the result that its pipeline needs could not be read."""
    claims.finish(ask(claims), Decision(Outcome.DEFERRED, "store_down", delay_ms=1_000))
    assert isinstance(ask(claims), Claim)


def test_a_snooze_ends_its_run(claims, store):
    claims.finish(ask(claims), Decision(Outcome.DEFERRED, "snoozed", delay_ms=1_000))
    assert ask(claims) == SkipDuplicate("stale")
    assert ask(claims, "other") == WaitForOwner(1_000 + LEASE)
    assert isinstance(ask(claims, run=1), Claim)


def test_a_claim_without_a_key_leaves_nothing_behind(claims, store):
    claims.finish(ask(claims, keyed=False), SUCCEEDED)
    assert store.get("k").value is None


class Again:
    def __init__(self, **options):
        self.options = options


def test_a_retry_that_is_being_published_is_published_again_by_a_redelivery(claims, store):
    claim = ask(claims)
    claims.record_ending(claim, OutgoingMessage(Again(retries=1, pipe_target={"large": 1}), 2_000))
    answer = ask(claims, dead=died)
    assert isinstance(answer, actions.RepublishRetry)
    assert answer.retry["options"] == {"retries": 1}
    assert isinstance(ask(claims, run=1), Claim)


def test_a_pending_retry_is_stored_without_the_options_that_every_run_has(claims, store):
    same = {"pipe_target": {"actor_name": "next"}, "group_completion_callbacks": [1]}
    claim = ask(claims)
    before = time.time() * 1_000
    message = dramatiq.Message("q", "job", (), {}, {"retries": 1, "tag": "x", **same})
    claims.record_ending(claim, OutgoingMessage(message, 5_000))
    retry = store.record("k").retry
    assert retry["options"] == {"retries": 1, "tag": "x"}
    assert before + 5_000 <= retry["due"] + 1 <= before + 15_000


def test_a_run_that_another_middleware_skipped_has_ended(claims, store):
    claims.finish(ask(claims), Decision(Outcome.SKIPPED))
    assert ask(claims) == SkipDuplicate("stale")


def test_a_publish_that_was_given_up_half_way_is_left_to_the_redelivery(claims, store):
    """The broker may have accepted the retry: the run has ended, and its end is not taken back."""
    claim = ask(claims)
    claims.record_ending(claim, OutgoingMessage(Again(retries=1), 2_000))
    claims.finish(claim, Decision(Outcome.INTERRUPTED, "handoff_failed"))
    assert isinstance(ask(claims), actions.RepublishRetry)


def test_a_copy_of_the_same_run_is_no_retry_and_is_not_announced_as_one(claims, store):
    """Else a redelivery would hand it on, and the copy find the same, without end."""
    claim = ask(claims, run=1)
    claims.record_ending(claim, OutgoingMessage(Again(retries=1), 2_000))
    assert store.record("k").state == "running"


def test_a_register_that_changes_at_each_look_defers_the_message(claims, store):
    asked = []

    def swap(*args):
        asked.append(args)
        return Entry(Record(records.FREE, f"m{len(asked)}", 0, "elsewhere:1:place:1", "1", 0, 1, KEEP).encode(), KEEP)

    store.swap = swap
    assert ask(claims) == WaitForOwner(LEASE)
    assert 1 < len(asked) <= 100


# The store is down.


def test_a_claim_whose_reply_was_lost_has_been_made(claims, store):
    swap, lost = store.swap, []

    def swap_twice(*args):
        if not lost:
            lost.append(swap(*args))
        return swap(*args)

    store.swap = swap_twice
    assert isinstance(ask(claims), Claim)
    assert lost == [None]


def test_a_claim_that_was_known_late_to_be_made_is_made_once_more(claims, store, monkeypatch):
    clock = iter([0, LEASE, 2 * LEASE, 2 * LEASE])  # when the first try begins and ends, and the second
    monkeypatch.setattr(claims_module.clock, "monotonic", lambda: next(clock))
    swap, calls = store.swap, []

    def watched(name, expected, value, ttl):
        calls.append((expected, value))
        found = swap(name, expected, value, ttl)
        return store.get(name) if len(calls) == 1 else found  # As where the reply was lost, and the call repeated.

    store.swap = watched
    claim = ask(claims)
    assert isinstance(claim, Claim)
    assert len(calls) == 2
    assert calls[1][0] == calls[0][1]


def test_a_claim_whose_reply_was_lost_is_no_start(claims, store):
    swap = store.swap

    def swap_and_fail(*args):
        swap(*args)
        raise TimeoutError

    for _ in range(5):
        store.swap = swap_and_fail
        with pytest.raises(StoreDown):
            ask(claims)
    store.swap = swap
    assert ask(claims).record.starts == 1


def test_a_claim_whose_reply_was_lost_keeps_the_ended_runs_of_the_key(claims, store):
    claims.finish(ask(claims, "first"), RETRIED)
    store.now += 66
    swap = store.swap

    def swap_and_fail(*args):
        if swap(*args) is None:
            raise TimeoutError
        return swap(*args)

    store.swap = swap_and_fail
    with pytest.raises(StoreDown):
        ask(claims, "second")
    store.swap = swap
    assert ask(claims, "first", dead=died) == SkipDuplicate("stale")


def test_a_start_in_another_process_counts_whatever_its_token(claims, store):
    before = set(tokens._unconfirmed_tokens)
    store.down = True
    with pytest.raises(StoreDown):
        ask(claims)
    store.down = False
    [token] = tokens._unconfirmed_tokens - before
    record = Record(records.RUNNING, "m", owner="elsewhere:1:x:1", token=token, starts=1, started_at=0, retention=KEEP)
    store.put("k", record.encode(), LEASE + KEEP)
    assert ask(claims, dead=died).record.starts == 2


def test_a_start_is_counted_where_the_store_is_down_when_it_is_to_be_excused(claims, store):
    claim = ask(claims)
    store.down = True
    claims.uncount_start(Delivered(claim))
    claims.uncount_start(Delivered(None))
    store.down = False
    assert store.record("k").starts == 1


def test_an_ending_that_is_no_completion_is_tried_once_and_left_to_the_renewing_thread(claims, store, slept):
    claim = ask(claims)
    store.down = True
    claims.finish(claim, DEAD)
    assert slept == []


def test_a_completion_is_tried_for_some_seconds(claims, store, slept, caplog):
    claim = ask(claims)
    store.down = True
    claims.finish(claim, SUCCEEDED)
    assert sum(slept) == pytest.approx(5)
    assert "The completion of message m is not recorded yet" in caplog.text


def test_the_end_of_a_claim_without_a_key_is_tried_once(claims, store, slept):
    claim = ask(claims, keyed=False)
    store.down = True
    claims.finish(claim, SUCCEEDED)
    assert slept == []


# A completion that another call carries.


def test_a_completion_that_was_carried_ends_the_claim(claims, store):
    store.putting = lambda *arguments: arguments
    claim = ask(claims)
    assert claims.completion_command(claim) == ("k", records.completed_by("m"), KEEP)
    store.put(*claims.completion_command(claim))
    claims.drop(claim)
    claims.leases.renew()
    assert store.renewals == []
    assert is_dead(claim.record)
    assert ask(claims, "other") == SkipDuplicate("completed", "m")


# An ending that is late.


def test_an_ending_that_could_not_be_written_holds_the_key_until_it_is(claims, store):
    claim = ask(claims)
    store.down = True
    claims.finish(claim, DEAD)
    store.down = False
    assert ask(claims, "other") == WaitForOwner(LEASE)
    assert not is_dead(claim.record)
    claims.leases.renew()
    assert is_dead(claim.record)
    assert isinstance(ask(claims, "other"), Claim)


@pytest.fixture
def failing_at_one(claims, store):
    """A store that fails whenever it is asked to write one name, also in a batch with others."""
    write = store._write

    def fail_at_it(key, value, ttl):
        if key == "odd" and store.fails:
            raise ValueError("can't be written")
        write(key, value, ttl)

    store.fails, store._write = False, fail_at_it
    return claims


def test_an_ending_that_can_never_be_written_delays_no_other_ending_and_no_renewal(failing_at_one, store, caplog):
    claims = failing_at_one
    odd, other, running = ask(claims, "m1", name="odd"), ask(claims, "m2", name="k2"), ask(claims, "m3", name="k3")
    store.fails = True
    claims.finish(odd, DEAD)
    store.down = True
    claims.finish(other, DEAD)
    store.down = False
    store.now += 50
    claims.leases.renew()
    assert is_dead(other.record)
    assert store.get("k3").left == LEASE + KEEP
    assert not is_dead(odd.record)
    caplog.clear()
    for _ in range(30):
        claims.leases.renew()
    assert store.get("k3").value == running.value
    assert [record.levelname for record in caplog.records].count("CRITICAL") == 1
    assert "The idempotency store refuses the record for message m1" in caplog.text
    assert is_dead(odd.record)


def test_an_ending_that_can_be_written_again_later_is_written_and_not_given_up(failing_at_one, store, caplog):
    claims = failing_at_one
    odd = ask(claims, "m1", name="odd")
    store.fails = True
    claims.finish(odd, DEAD)
    for _ in range(5):
        with pytest.raises(StoreDown):
            claims.leases.renew()
    store.fails = False
    claims.leases.renew()
    assert is_dead(odd.record)
    assert "given up" not in caplog.text


def test_while_the_store_is_down_no_ending_is_given_up_and_few_are_tried(claims, store):
    owed = [ask(claims, f"m{number}", name=f"k{number}") for number in range(10)]
    store.down = True
    for claim in owed:
        claims.finish(claim, DEAD)
    asked = []
    find = store._find
    store._find = lambda key: asked.append(key) or find(key)
    for _ in range(50):
        asked.clear()
        with pytest.raises(StoreDown):
            claims.leases.renew()
        assert len(asked) < 10
    store.down = False
    claims.leases.renew()
    assert all(is_dead(claim.record) for claim in owed)


# Renewals.


def test_all_claims_are_renewed_in_one_round_trip(claims, store):
    for number in range(5):
        ask(claims, f"m{number}", name=f"k{number}")
    store.now += 50
    claims.leases.renew()
    assert store.renewals == [[f"k{number}" for number in range(5)]]
    assert {store.get(f"k{number}").left for number in range(5)} == {LEASE + KEEP}


def test_a_renewed_claim_needs_no_further_call_of_the_store(claims, store, monkeypatch):
    ask(claims)
    swaps = []
    monkeypatch.setattr(store, "swap", lambda *arguments: swaps.append(arguments))
    claims.leases.renew()
    assert (store.renewals, swaps) == ([["k"]], [])


def test_a_claim_that_has_ended_is_renewed_no_more(claims, store):
    claims.finish(ask(claims), DEAD)
    claims.leases.renew()
    assert store.renewals == []


def test_a_claim_that_was_forgotten_is_written_again(claims, store):
    claim = ask(claims)
    store.delete("k")
    claims.leases.renew()
    assert store.get("k").value == claim.value


def test_a_claim_that_ends_while_it_is_renewed_is_not_written_again(claims, store):
    """The renewal finds nothing there, since the run has just been concluded."""
    claim = ask(claims, keyed=False)
    renew, concluded = store.renew, threading.Event()
    drop = claims.drop

    def renew_late(renewals):
        store.swap("k", claim.value, None, 1)  # what finish() has written; its thread comes to let go only later
        claim.over = True
        concluded.set()
        return renew(renewals)

    store.renew = renew_late
    claims.leases.renew()
    drop(claim)
    assert store.get("k").value is None


def test_a_renewal_does_not_undo_an_ending_that_is_being_written(claims, store):
    claim = ask(claims, keyed=False)
    swap = store.swap

    def swap_and_renew(*arguments):
        store.swap = swap
        found = swap(*arguments)
        claims.leases.renew()
        return found

    store.swap = swap_and_renew
    claims.finish(claim, SUCCEEDED)
    assert store.get("k").value is None


def test_a_lost_claim_is_logged_and_never_won_back(claims, store, caplog):
    ask(claims)
    theirs = Record(records.RUNNING, "m", 0, "elsewhere:1:place:1", "1", retention=KEEP).encode()
    store.put("k", theirs, LEASE)
    claims.leases.renew()
    assert store.get("k").value == theirs
    assert "was lost during the run" in caplog.text


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def threads_of_leases():
    return [thread for thread in threading.enumerate() if thread.name == "dramatiq-policies-leases"]


@pytest.fixture
def quick(store):
    before = set(threads_of_leases())
    made = Claims(store, 90)
    made.threads = lambda: [thread for thread in threads_of_leases() if thread not in before]
    yield made
    store.down = False
    made.close()


def test_no_thread_before_the_first_claim_and_one_for_all_of_them(quick, store):
    assert quick.threads() == []
    barrier = threading.Barrier(8)

    def claim(number):
        barrier.wait()
        ask(quick, f"m{number}", name=f"k{number}")

    several = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    assert len(quick.threads()) == 1
    wait_until(lambda: any(len(names) == 8 for names in store.renewals))


def test_renewals_outlive_a_store_that_is_down(quick, store):
    ask(quick)
    store.down = True
    tried = len(store.renewals)
    wait_until(lambda: len(store.renewals) > tried + 2)
    store.down = False
    store.now = 0.05
    wait_until(lambda: store.get("k").left == 90 + KEEP)
    assert len(quick.threads()) == 1


def test_a_claim_made_just_after_a_worker_was_shut_down_is_renewed(quick, store):
    hold, entered = threading.Event(), threading.Event()
    renew = store.renew

    def slow(renewals):
        entered.set()
        hold.wait(10)
        return renew(renewals)

    ask(quick)
    store.renew = slow
    assert entered.wait(10)
    quick.close()  # while its thread is at the store
    ask(quick, "next", name="next")
    store.renew = renew
    hold.set()
    store.renewals.clear()
    wait_until(lambda: any("next" in names for names in store.renewals))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a fork beside threads, which is the subject
def test_a_forked_child_renews_its_own_claims_and_not_its_parents(quick, store):
    ask(quick)
    read, write = os.pipe()
    # As if another thread of the parent were in it just now.
    with quick.leases._lock, store._lock:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)  # Should it hang: no timeout of pytest's reaches it.
            try:
                store.renewals.clear()
                ask(quick, "theirs", name="theirs")
                wait_until(lambda: store.renewals)
                os.write(write, repr((store.renewals[0], store.record("k").owner)).encode())
            finally:
                os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        assert answer.read() == repr((["theirs"], owners.this_process()))
    os.waitpid(child, 0)


# Ends that are not a job's fault.


class Delivered:
    def __init__(self, claim, message_id="m"):
        self.claim = claim
        self.message = replace_message(message_id)


def replace_message(message_id):
    import dramatiq

    return dramatiq.Message("q", "job", (), {}, {}).copy(message_id=message_id)


def test_a_start_that_is_excused_does_not_count(claims, store):
    claim = ask(claims)
    claims.uncount_start(Delivered(claim))
    assert ask(claims, dead=died).record.starts == 1


def test_a_start_without_a_key_that_is_excused_does_not_count_either(claims, store):
    claims.uncount_start(Delivered(None))
    name = crash_counter_name("m")
    assert ask(claims, name=name, dead=died, keyed=False, starts=2).record.starts == 1


def test_an_unreadable_owner_is_never_certainly_dead():
    assert not is_dead(Record(records.RUNNING, "m", owner=""))
    assert not is_dead(Record(records.RUNNING, "m", owner="host:pid:place:start"))
    assert not is_dead(Record(records.RUNNING, "m", owner="nonsense"))


def test_each_message_without_a_key_is_counted_apart_from_others_and_from_keys():
    names = [crash_counter_name("a"), crash_counter_name("b"), register_of("a", "b").name, register_of("b", "a").name]
    assert len(set(names)) == len(names)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a fork beside threads
def test_nothing_runs_yet_in_a_forked_child(claims):
    before = claims.exclusive
    pid = os.fork()
    if pid == 0:
        os._exit(0 if claims.exclusive is not before else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert claims.exclusive is before
