"""A StubBroker with dramatiq_policies, a real worker, and the published outcomes."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import dramatiq
from dramatiq import Worker
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import ErrorClassifier, install

try:
    from sentry_sdk.transport import Transport
except ImportError:  # scripts/release_check.py runs tests with one extra alone
    Transport = object

PATIENCE = 20.0
#: Whether Django has tasks: Django 6, which needs Python 3.12.
HAS_DJANGO_TASKS = importlib.util.find_spec("django") is not None and bool(importlib.util.find_spec("django.tasks"))


def is_busy(broker):
    """Return whether any message of a StubBroker is queued, delayed or running.

    All queues are locked at once: a message that moves to another queue meanwhile would be seen in neither.
    """
    with ExitStack() as locks:
        queues = list(broker.queues.values())
        for queue in queues:
            locks.enter_context(queue.mutex)
        return any(queue.unfinished_tasks for queue in queues)


class Collector:
    """Takes outcomes from any thread, and waits for as many as a test expects."""

    def __init__(self):
        self.events = []
        self._changed = threading.Condition()

    def __call__(self, event):
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait_for(self, condition, what="the condition", patience=PATIENCE):
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self.events), patience):
                raise AssertionError(f"{what} did not come true; so far: {self.events}")


class Stage:
    """Everything that a scenario needs.

    Parameters:
      middleware: Added to the default middleware before dramatiq_policies.
      bundle: More arguments of `install`.
      rules: The arguments of the ErrorClassifier.
    """

    def __init__(self, *, middleware=(), bundle=None, broker=None, **rules):
        self.collected = Collector()
        self.broker = StubBroker() if broker is None else broker
        for one in middleware:
            self.broker.add_middleware(one)
        self.classifier = ErrorClassifier(on_outcome=self.collected, **rules)
        install(self.broker, error_classifier=self.classifier, **(bundle or {}))
        self.broker.emit_after("process_boot")
        self.actor = functools.partial(dramatiq.actor, broker=self.broker)
        self.worker = None

    @contextmanager
    def working(self, threads=1):
        """Run a worker meanwhile. At the end all threads of the worker must still be alive.

        With one thread the outcomes come in order: the worker publishes outcomes after the follow-up messages.
        """
        worker = self.worker = Worker(self.broker, worker_timeout=10, worker_threads=threads)
        worker.start()
        # Dramatiq's threads ignore a stop before their start.
        while not all(thread.running for thread in (*worker.workers, *worker.consumers.values())):
            time.sleep(0.001)
        try:
            yield worker
            assert all(thread.is_alive() for thread in (*worker.workers, *worker.consumers.values()))
        finally:
            worker.stop()

    def run(self, threads=1):
        """Work until nothing is queued, delayed or running."""
        with self.working(threads):
            self.drain()
        return self

    def drain(self):
        deadline = time.monotonic() + PATIENCE
        while is_busy(self.broker):
            if time.monotonic() > deadline:
                raise AssertionError(f"the queues did not become empty; so far: {self.events}")
            for queue in list(self.broker.queues):
                if queue in self.broker.get_declared_queues() and not queue.endswith(".DQ"):
                    self.broker.join(queue, timeout=int(PATIENCE * 1_000), fail_fast=False)

    @property
    def events(self):
        return self.collected.events

    def outcomes(self, actor=None):
        return [event.outcome.value for event in self.events if actor is None or event.actor == actor]

    def reasons(self):
        return [event.reason for event in self.events]

    @property
    def dead(self):
        """The dead letters' messages, as they would be read off the queue."""
        return [letter for letters in self.broker.dead_letters_by_queue.values() for letter in letters]

    def failures(self):
        return [letter.options["failure"] for letter in self.dead]


class StatsdServer:
    """A StatsD server: takes datagrams, in order."""

    def __init__(self, port=0):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", port))
        self.socket.settimeout(5)
        self.port = self.socket.getsockname()[1]

    def packet(self):
        """The next datagram's lines."""
        return self.socket.recv(65_536).decode().splitlines()

    def has_no_more(self):
        self.socket.settimeout(0.05)
        try:
            return not self.socket.recv(65_536)
        except TimeoutError:
            return True

    def end(self):
        """Raise an error in the thread waiting for the next datagram, after the earlier datagrams."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"\xff", ("127.0.0.1", self.port))

    def close(self):
        self.socket.close()


class PlainClient:
    """Has the methods of a statsd client, and remembers its calls."""

    def __init__(self):
        self.calls = []

    def incr(self, name, count=1):
        self.calls.append(("c", name, count))

    def timing(self, name, value):
        self.calls.append(("ms", name, value))

    def gauge(self, name, value):
        self.calls.append(("g", name, value))


class TaggedClient:
    """Has the methods of a DogStatsD client, and remembers its calls."""

    def __init__(self):
        self.calls = []

    def increment(self, name, value=1, tags=None):
        self.calls.append(("c", name, value, tags))

    def timing(self, name, value, tags=None):
        self.calls.append(("ms", name, value, tags))

    def gauge(self, name, value, tags=None):
        self.calls.append(("g", name, value, tags))


class Captured(Transport):
    """Keeps envelopes instead of sending them."""

    def __init__(self, options=None):
        super().__init__(options)
        self.envelopes = []

    def capture_envelope(self, envelope):
        self.envelopes.append(envelope)

    def items(self, kind):
        return [item.payload.json for envelope in self.envelopes for item in envelope.items if item.type == kind]

    @property
    def events(self):
        return self.items("event")


class SentryEndpoint(BaseHTTPRequestHandler):
    """Speaks as much of Sentry's envelope endpoint, for project 1, as a client needs."""

    @classmethod
    @contextmanager
    def server(cls):
        server = ThreadingHTTPServer(("127.0.0.1", 0), cls)
        server.received = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    @staticmethod
    def events_of(server):
        events = []
        for path, body in server.received:
            assert path == "/api/1/envelope/"
            lines = body.split(b"\n")
            events += [
                json.loads(payload)
                for header, payload in zip(lines[1::2], lines[2::2], strict=False)
                if json.loads(header)["type"] == "event"
            ]
        return events

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.received.append((self.path, body))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args):
        pass
