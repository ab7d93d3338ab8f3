"""The sender: jobs of every kind, nearly all of them twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from dramatiq import Message, group, pipeline
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend as Barriers

from .clients import redis_client

#: Jobs a second. Half of the threads are busy, so that an outage is caught up with.
RATE = 50
#: Seconds for which a send is tried again.
PATIENCE = 60.0


class Sender:
    """Sends nearly every job twice, and again where a broker did not say that it has it.

    Attributes:
      expected: The keys whose effects must be made.
      doomed: The ids of the messages that must end as dead letters.
      replicas: How many of Redis' replicas must have a message before it counts as sent.
      jobs: How many jobs were sent: as many as were wanted, and on until `enough` is set.
    """

    def __init__(self, broker: Any, store: str, jobs: int, *, replicas: int = 0) -> None:
        self.broker = broker
        self.replicas = replicas
        broker.add_middleware(GroupCallbacks(Barriers(client=redis_client(store))))
        broker.declare_queue("jobs")
        self.wanted = jobs
        self.enough = threading.Event()
        self.expected: list[str] = []
        self.doomed: list[str] = []
        self.jobs = 0
        self.failed: BaseException | None = None
        self.thread = threading.Thread(target=self._send_all)

    def _send_all(self) -> None:
        started = time.monotonic()
        try:
            while self.jobs < self.wanted or not self.enough.is_set():
                self._send_job(self.jobs)
                time.sleep(max(0.0, started + self.jobs / RATE - time.monotonic()))
        except BaseException as error:
            self.failed = error

    def _send_job(self, number: int) -> None:
        kind = number % 20
        self.jobs += 1
        if kind in (0, 1, 2):
            self._twice("flaky", number)
        elif kind == 3:
            self.doomed += self._twice("hopeless", number, effect=False)
        elif kind in (4, 5):
            self._expect("first", number)
            self._expect("second", number)
            for _ in range(1 if kind == 5 else 2):
                self._insist(lambda: pipeline([message("first", number), message("second")], broker=self.broker).run())
        elif kind == 6:
            members = range(number * 1_000, number * 1_000 + 3)
            self._expect("together", number)
            for one in members:
                self._expect("member", one)
            for _ in range(2):

                def run() -> None:
                    some = group([message("member", one) for one in members], broker=self.broker)
                    some.add_completion_callback(message("together", number))
                    some.run()

                self._insist(run)
        elif kind == 7:
            self._once("unguarded", number)
        elif kind == 8:
            # A duplicate could replace a lost message; these messages have none.
            self._once("flaky", number)
        else:
            self._twice("plain", number)

    def _expect(self, actor: str, number: int) -> None:
        self.expected.append(f"{actor}:{number}")

    def _once(self, actor: str, number: int) -> None:
        self._expect(actor, number)
        one = message(actor, number)
        self._insist(lambda: self.broker.enqueue(one))

    def _twice(self, actor: str, number: int, *, effect: bool = True) -> list[str]:
        if effect:
            self._expect(actor, number)
        sent = []
        for _ in range(2):
            one = message(actor, number)
            self._insist(lambda one=one: self.broker.enqueue(one))
            sent.append(one.message_id)
        return sent

    def _insist(self, send: Callable[[], Any]) -> None:
        give_up = time.monotonic() + PATIENCE
        while True:
            try:
                send()
                if self.replicas and self.broker.client.wait(self.replicas, 1_000) < self.replicas:
                    raise ConnectionError("no replica has it yet")
                return
            except Exception:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.1)


def message(actor: str, *args: object) -> Message[Any]:
    return Message("jobs", actor, args, {}, {})
