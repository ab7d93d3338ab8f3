"""A model of workers, a broker and a store: whatever happens between any two steps, each job has its effect, once.

The claims, their records and the store are the real ones, on a clock that the model moves. Workers are processes of which
each has its own tokens, as in life, and the broker delivers at least once, with copies, and drops connections. A worker may
be killed, or fall silent for longer than its lease, between any two steps of a delivery; a reply of the store may be lost.
"""

from __future__ import annotations

import itertools
from random import Random
from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dramatiq_policies import Outcome
from dramatiq_policies.delivery.decision import Decision
from dramatiq_policies.delivery.outgoing import OutgoingMessage
from dramatiq_policies.idempotency import actions, tokens
from dramatiq_policies.idempotency import claims as claims_module
from dramatiq_policies.idempotency import lease_renewal as leases
from dramatiq_policies.idempotency import owner as owners
from dramatiq_policies.idempotency.actions import Request
from dramatiq_policies.idempotency.claim import Claim, QuarantinedClaim
from dramatiq_policies.idempotency.claims import Claims
from dramatiq_policies.idempotency.store_client import StoreDown
from dramatiq_policies.idempotency.tokens import is_dead
from dramatiq_policies.stores.memory import MemoryStore

LEASE, KEEP, DELAY = 60_000, 10**9, 5_000

RECEIVED, RUNNING, DECIDED, ANNOUNCED, HANDED, CONCLUDED, PUT_BACK = (
    "taken",
    "running",
    "decided",
    "announced",
    "handed on",
    "concluded",
    "put back",
)


#: Whether a message has the key of the one before it.
_KEYS = ["the same", "the same", "another"]
_OUTCOMES = ["succeeded", "succeeded", "retried", "dead"]
_EVENTS = [*["work"] * 10, *["time"] * 3, "lease", "send", "send", "copy", "drop", "kill", "lose"]
_STEPS = [1, 1, 1, 2, 4, 6]
#: How many worlds of the long walk.
WALKS = 120

KEYS, OUTCOMES, EVENTS, STEPS = map(st.sampled_from, (_KEYS, _OUTCOMES, _EVENTS, _STEPS))
CRASHES = st.sampled_from([None, 1, 3])
HOSTS = st.lists(st.sampled_from("ab"), min_size=2, max_size=3)
numbers = st.integers(0, 5)


class Lossy(MemoryStore):
    """Loses a request or a reply when told to."""

    lose = None

    def _lossy(self, call, *args):
        lose, self.lose = self.lose, None
        if lose == "request":
            raise TimeoutError
        answer = call(*args)
        if lose == "reply":
            raise TimeoutError
        return answer

    def swap(self, *args):
        return self._lossy(super().swap, *args)

    def put(self, *args):
        return self._lossy(super().put, *args)

    def renew(self, *args):
        return self._lossy(super().renew, *args)


class Message:
    """A delivery's message: one run of it, or a copy."""

    def __init__(self, id_, run, key, due=0.0):
        self.id, self.run, self.key, self.due = id_, run, key, due
        self.options = {"retries": run}

    def __repr__(self):
        return f"{self.id}.{self.run}"


class Held:
    """A message in a worker's hands.

    Attributes:
      gone: The connection that it came over is lost: the broker has given it to others.
      effect: Its job has had its effect.
      renewed: When its claim was last made sure of, by the store's clock.
    """

    def __init__(self, message):
        self.message = message
        self.stage = RECEIVED
        self.claim = None
        self.outcome = None
        self.gone = self.effect = False
        self.renewed = 0.0

    def is_active(self):
        """Whether its job is running, or has just succeeded and not said so yet."""
        return self.stage == RUNNING or (self.stage == DECIDED and self.effect)


class Worker:
    """A process: its claims, and what a fork or a reboot would not carry over."""

    def __init__(self, name, host, store):
        self.name, self.host = name, host
        self.alive = True
        self.held = []
        self.globals = {"_active_tokens": set(), "_unconfirmed_tokens": set(), "_numbers": itertools.count(1)}
        self.claims = Claims(store, LEASE)
        self.claims.leases._ensure_thread = lambda: None


class Simulation:
    """The world, and what must hold in it."""

    def __init__(self, hosts, crashes, one_step, keys):
        self.now = 0.0
        self.store = Lossy(clock=lambda: self.now)
        self.all = {}
        self.workers = []
        self.queue = []
        self.current = None
        self.numbers = itertools.count(1)
        self.effects, self.excused = {}, {}
        self.completed, self.ended, self.succeeded = set(), set(), set()
        #: Claims of succeeded runs whose completion the store has not taken yet.
        self.untold = {}
        self.final = {}
        self.messages, self.key = {}, "k"
        self.patches = [
            mock.patch.object(owners, "this_process", lambda: self.current.name),  # noqa: PT008
            *(mock.patch.object(tokens, name) for name in ("_active_tokens", "_unconfirmed_tokens", "_numbers")),
            mock.patch.object(owners, "is_dead", self._is_certainly_dead),
            mock.patch.object(claims_module, "_COMPLETION_PAUSES", ()),
            mock.patch.object(claims_module.alerts.logger, "disabled", new=True),
            mock.patch.object(leases.logger.logger, "disabled", new=True),
        ]
        for patch in self.patches:
            patch.start()
        self.max_crashes = crashes
        # Whether publish and ack are one step, as on Redis, or two, as on RabbitMQ.
        self.one_step = one_step
        self.workers = [self._boot(host) for host in hosts]
        for key in keys:
            self.send(key)

    def _is_certainly_dead(self, owner):
        other = self.all[owner]
        return not other.alive and other.host == self.current.host

    def _as(self, worker):
        """Let what follows happen in that process."""
        self.current = worker
        for name, value in worker.globals.items():
            setattr(tokens, name, value)

    def _boot(self, host):
        name = f"worker{next(self.numbers)}"
        self.all[name] = Worker(name, host, self.store)
        return self.all[name]

    # The producers, the broker, and the faults.

    def happens(self, what, which, pick, key, outcome, steps):
        if what == "work":
            self.work(which, pick, outcome, steps)
        elif what == "send":
            self.send(key)
        elif what == "lose":
            self.store.lose = ("request", "reply")[which % 2]
        elif what == "time":
            self._pass((1, DELAY, LEASE // 2)[pick % 3])
        elif what == "lease":
            # One worker is silent for longer than its lease, or none is.
            self._pass(LEASE + 1, {which} if pick % 2 else {})
        else:
            getattr(self, what)(which)

    def send(self, key):
        if key == "another":
            self.key = f"k{next(self.numbers)}"
        key, id_ = self.key, f"m{next(self.numbers)}"
        self.messages[id_] = key
        self.final[id_] = set()
        self.queue.append(Message(id_, 0, key))

    def copy(self, which):
        if self.queue:
            message = self.queue[which % len(self.queue)]
            self.queue.append(Message(message.id, message.run, message.key, message.due))

    def drop(self, which):
        """Its connection to the broker is lost; it works on."""
        for held in self._worker(which).held:
            self._give_back(held)

    def _give_back(self, held):
        if not held.gone:
            held.gone = True
            self.queue.append(Message(held.message.id, held.message.run, held.message.key))

    def kill(self, which):
        which %= len(self.workers)
        worker = self.workers[which]
        worker.alive = False
        for held in worker.held:
            self._give_back(held)
            if held.effect and held.stage == DECIDED:
                self._excuse(held.message.key)
        for claim, _ in worker.claims.leases._pending_writes:
            if self.untold.pop(claim, None) is not None:
                # The store was never told.
                self._excuse(claim.name)
        self.workers[which] = self._boot(worker.host)

    def _excuse(self, key):
        self.excused[key] = self.excused.get(key, 0) + 1

    # Time.

    def _pass(self, ms, silent=()):
        """Every worker but the silent ones renews its leases meanwhile."""
        while ms > 0:
            step = min(ms, LEASE // 3)
            ms -= step
            self.now += step / 1_000
            for number, worker in enumerate(self.workers):
                if number not in silent:
                    self._renew(worker)

    def _renew(self, worker):
        self._as(worker)
        owed = [claim for claim, _ in worker.claims.leases._pending_writes]
        try:
            worker.claims.leases.renew()
        except StoreDown:
            pass
        left = [claim for claim, _ in worker.claims.leases._pending_writes]
        for claim in owed:
            if claim not in left and claim in self.succeeded:
                self.completed.add(claim.name)
                self.untold.pop(claim, None)
        for held in [*worker.held, *(self.untold[claim] for claim in left if claim in self.untold)]:
            if held.claim is not None and self.store.get(held.message.key).value == held.claim.value:
                held.renewed = self._last_write(held)

    def _last_write(self, held):
        return self.now - (LEASE + KEEP - self.store.get(held.message.key).left) / 1_000

    # The workers.

    def _worker(self, which):
        return self.workers[which % len(self.workers)]

    def work(self, which, pick, outcome, steps):
        worker = self._worker(which)
        due = [message for message in self.queue if message.due <= self.now]
        if pick % 2 >= len(worker.held) and due:
            message = due[pick % len(due)]
            self.queue.remove(message)
            worker.held.append(Held(message))
        if worker.held:
            held = worker.held[pick % 2 % len(worker.held)]
            for _ in range(steps):
                if held in worker.held:
                    self._step(worker, held, outcome)

    def _step(self, worker, held, outcome):
        self._as(worker)
        {
            RECEIVED: self._claim,
            RUNNING: self._run,
            DECIDED: self._announce,
            ANNOUNCED: self._hand_on,
            HANDED: self._finish,
            CONCLUDED: self._ack,
            PUT_BACK: self._ack,
        }[held.stage](worker, held, outcome)

    def _claim(self, worker, held, outcome):
        message = held.message
        request = Request(message.id, message.run, is_dead, self.max_crashes, ends_are_recorded=not self.one_step)
        try:
            answer = self._ask(worker, message, request)
            if isinstance(answer, actions.Start):
                answer = self._ask(worker, message, request._replace(alone=True))
        except StoreDown:
            answer = actions.WaitForOwner(1_000)
        held.stage = PUT_BACK
        if isinstance(answer, Claim):
            self._check_claim(held)
            held.claim, held.stage = answer, RUNNING
            held.renewed = self.now
        elif isinstance(answer, QuarantinedClaim):
            held.claim, held.stage, held.outcome = answer.claim, ANNOUNCED, "dead"
        elif isinstance(answer, actions.WaitForOwner):
            self.queue.append(Message(message.id, message.run, message.key, self.now + 1))
        elif isinstance(answer, actions.RepublishRetry):
            self.queue.append(Message(message.id, answer.retry["options"]["retries"], message.key, self.now))
        elif answer.reason == "completed":
            assert message.key in self.completed or self.effects.get(message.key), "completed by nobody"
            self.final[message.id].add("completed")

    def _ask(self, worker, message, request):
        return worker.claims.claim(message.key, request, keyed=True, retention=KEEP)

    def _check_claim(self, held):
        message = held.message
        assert message.key not in self.completed, f"{message} runs though its key is completed"
        assert (message.id, message.run) not in self.ended, f"{message} runs again though it has ended"
        for worker in self.workers:
            for other in worker.held:
                if other is not held and other.message.key == message.key and other.is_active():
                    assert self.now - other.renewed >= LEASE / 1_000, f"{message} runs beside {other.message}"
                    self._excuse(message.key)
        for claim, other in list(self.untold.items()):
            if claim.name == message.key:
                # The worker was silent until the end of its lease, before it could tell the store.
                assert self.now - other.renewed >= LEASE / 1_000, f"{message} runs although {other.message} has"
                del self.untold[claim]
                self._excuse(message.key)

    def _run(self, worker, held, outcome):
        held.outcome, held.stage = outcome, DECIDED
        if outcome == "succeeded":
            held.effect = True
            self.effects[held.message.key] = self.effects.get(held.message.key, 0) + 1

    def _announce(self, worker, held, outcome):
        if held.outcome == "succeeded":
            # The broker accepts the follow-up messages of a success before the completion.
            self._finish(worker, held, outcome)
            return
        if held.gone:
            self._give_up(worker, held)
            return
        if held.outcome == "retried" and not self.one_step:
            worker.claims.record_ending(
                held.claim, OutgoingMessage(Message(held.message.id, held.message.run + 1, held.message.key), DELAY)
            )
        held.stage = ANNOUNCED

    def _give_up(self, worker, held):
        worker.claims.finish(held.claim, Decision(Outcome.INTERRUPTED, "handoff_failed"))
        worker.held.remove(held)

    def _hand_on(self, worker, held, outcome):
        if held.gone:
            self._give_up(worker, held)
            return
        message = held.message
        if held.outcome == "retried":
            self.queue.append(Message(message.id, message.run + 1, message.key, self.now + DELAY / 1_000))
        else:
            self.final[message.id].add("dead")
        if self.one_step:
            held.gone = True  # Acked in the same step.
        held.stage = HANDED

    def _finish(self, worker, held, outcome):
        decision = {
            "succeeded": Decision(Outcome.SUCCEEDED),
            "retried": Decision(Outcome.RETRIED, delay_ms=DELAY),
            "dead": Decision(Outcome.DEAD, "exhausted"),
        }[held.outcome]
        claim, message = held.claim, held.message
        before = self.store.get(message.key).value
        claim_owned = before == claim.value
        worker.claims.finish(claim, decision)
        written = claim not in [one for one, _ in worker.claims.leases._pending_writes]
        if held.outcome == "succeeded":
            self.succeeded.add(claim)
            if written:
                self.completed.add(message.key)
            else:
                self.untold[claim] = held
        elif written and claim_owned:
            self.ended.add((message.id, message.run))
        held.stage = CONCLUDED

    def _ack(self, worker, held, outcome):
        if held.outcome == "succeeded":
            self.final[held.message.id].add("succeeded")
        worker.held.remove(held)

    # The invariants.

    def check_effects(self):
        """Doubled are only those of runs that were inside the job at a crash, or outlived their lease."""
        for key, effects in self.effects.items():
            assert effects <= 1 + self.excused.get(key, 0), f"{key} had its effect {effects} times"

    def close(self):
        for patch in self.patches:
            patch.stop()

    def come_to_rest(self):
        self.store.lose = None
        for _ in range(500):
            for worker in self.workers:
                due = [message for message in self.queue if message.due <= self.now]
                if due and not worker.held:
                    self.queue.remove(due[0])
                    worker.held.append(Held(due[0]))
                for held in list(worker.held):
                    while held in worker.held:
                        self._step(worker, held, "succeeded")
            if not self.queue:
                break
            self._pass(1_000 if any(m.due <= self.now for m in self.queue) else DELAY)
        assert self.queue == [], "messages go round for ever"
        self.check_effects()
        lost = [id_ for id_, final in self.final.items() if not final]
        assert lost == [], f"lost: {lost}"
        for key in {self.messages[id_] for id_, final in self.final.items() if final != {"dead"}}:
            assert self.effects.get(key), f"{key} never had its effect"


class Model(RuleBasedStateMachine):
    """The simulation, as Hypothesis plays and shortens it."""

    simulation = None

    @initialize(hosts=HOSTS, crashes=CRASHES, one_step=st.booleans(), keys=st.lists(KEYS, min_size=1, max_size=3))
    def begin(self, **world):
        self.simulation = Simulation(**world)

    # One rule: of several, Hypothesis leaves some out at random, and without any of these nothing much happens.
    @rule(what=EVENTS, which=numbers, pick=numbers, key=KEYS, outcome=OUTCOMES, steps=STEPS)
    def happens(self, **event):
        self.simulation.happens(**event)

    @invariant()
    def no_effect_is_doubled(self):
        if self.simulation is not None:
            self.simulation.check_effects()

    def teardown(self):
        if self.simulation is not None:
            try:
                self.simulation.come_to_rest()
            finally:
                self.simulation.close()


TestTheModel = Model.TestCase
TestTheModel.settings = settings(
    max_examples=50, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("first", range(0, WALKS, 20))
def test_a_long_walk_leads_nowhere_else(first):
    """Thousands of steps for each seed: too many for Hypothesis."""
    for seed in range(first, first + 20):
        random = Random(seed)
        simulation = Simulation(
            [random.choice("ab") for _ in range(random.randint(2, 3))],
            random.choice([None, 1, 3]),
            random.random() < 0.5,
            [random.choice(_KEYS) for _ in range(3)],
        )
        try:
            for _ in range(250):
                simulation.happens(
                    random.choice(_EVENTS),
                    random.randrange(6),
                    random.randrange(6),
                    random.choice(_KEYS),
                    random.choice(_OUTCOMES),
                    random.choice(_STEPS),
                )
                simulation.check_effects()
            simulation.come_to_rest()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        finally:
            simulation.close()
