"""One Sentry event for each bad ending, alone and beside Sentry's own integration."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import dramatiq
import pytest
import sentry_sdk
from dramatiq.broker import MessageProxy
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO, Middleware
from sentry_sdk.integrations.dramatiq import DramatiqIntegration
from sentry_sdk.integrations.logging import LoggingIntegration

from dramatiq_policies import (
    ConfigurationError,
    Discard,
    Outcome,
    OutcomeEvent,
    RetryPolicy,
    SentryReporter,
    Snooze,
    StuckJob,
    Timeout,
    constant,
    install,
)
from dramatiq_policies.delivery import limits, publishing
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.delivery.validation import _warned
from dramatiq_policies.observability import sentry_patches

from ..support import Captured, SentryEndpoint, Stage

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
# Not as it stands in an event, where the lines around an error do.
CARD = "4242" * 4


STACK = """  File "/app/jobs.py", line 7, in pay
    wait()
"""


class Unpaid(Exception):
    pass


class Sentry:
    """Sets up the SDK as an app would, and says what it would have sent."""

    def __call__(self, *integrations, **options):
        self.transport = Captured()
        sentry_sdk.init(
            "http://key@127.0.0.1:1/1",
            transport=self.transport,
            auto_enabling_integrations=False,
            integrations=integrations,
            **options,
        )
        return self

    @property
    def events(self):
        return self.transport.events

    def endings(self):
        """Actor, exception type and outcome of each event."""
        return [
            (event["tags"]["actor"], event["exception"]["values"][-1]["type"], event["tags"]["outcome"])
            for event in self.events
        ]


@pytest.fixture
def sentry():
    yield Sentry()
    sentry_sdk.get_client().close()
    sentry_sdk.get_global_scope().set_client(None)
    sentry_sdk.get_isolation_scope().clear()


@pytest.fixture(params=["alone", "beside"])
def either(request, sentry):
    """Set up without and with Sentry's own integration."""
    return lambda **options: sentry(*([DramatiqIntegration()] if request.param == "beside" else []), **options)


def stage_with(report="final", bundle=None, **rules):
    return Stage(bundle={"sentry": SentryReporter(report), **(bundle or {})}, **rules)


RULES = {"retry_on": {OSError: RetryPolicy(attempts=3, wait=constant(1))}, "discard_on": Unpaid, "alert_on": KeyError}


# --- which endings --------------------------------------------------------------------------------------------------


def test_a_bad_ending_is_one_event_and_a_retry_is_none(either):
    sentry = either()
    stage = stage_with(**RULES)

    @stage.actor
    def pay(error):
        raise {"down": OSError, "unpaid": Unpaid, "key": KeyError}[error]

    for error in ("down", "unpaid", "key"):
        pay.send(error)
        stage.run()
    assert stage.outcomes() == ["retried", "retried", "dead", "discarded", "alerted"]
    assert sentry.endings() == [
        ("pay", "OSError", "dead"),
        ("pay", "Unpaid", "discarded"),
        ("pay", "KeyError", "alerted"),
    ]
    assert [event["level"] for event in sentry.events] == ["error", "warning", "fatal"]


def test_half_a_character_costs_no_event(either):
    sentry = either()
    stage = stage_with(discard_on=Unpaid)

    @stage.actor(tags={"team": "half \ud83d"})
    def pay(text):
        raise Unpaid(text)

    pay.send("half \ud83d")
    stage.run()
    (event,) = sentry.events
    assert event["exception"]["values"][-1]["value"] == r"half \ud83d"
    json.dumps(event, ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize("discard_logger", [None, False])
def test_the_log_lines_on_it_are_no_second_event(either, discard_logger):
    sentry = either()
    stage = stage_with(bundle={"discard_logger": discard_logger}, **RULES)

    @stage.actor(max_retries=0)
    def pay(error):
        raise error

    @stage.actor(queue_timeout=1)
    def late():
        pass

    @stage.actor(throws=ValueError)
    def thrown():
        raise ValueError

    late.send()
    time.sleep(0.01)
    thrown.send()
    stage.run()
    assert sorted(sentry.endings()) == [("late", "QueueTimeoutExceeded", "expired"), ("thrown", "ValueError", "dead")]


def test_any_other_error_logged_by_dramatiq_policies_becomes_an_event(sentry):
    def broken(message, error):
        raise RuntimeError("the hook is broken")

    sentry()
    stage = stage_with(discard_on=Unpaid, after_discard=broken)

    @stage.actor
    def pay():
        raise Unpaid

    pay.send()
    stage.run()
    assert sorted(event["exception"]["values"][-1]["type"] for event in sentry.events) == ["RuntimeError", "Unpaid"]


def test_first_reports_the_first_failure_and_no_other(either):
    sentry = either()
    stage = stage_with("first", **RULES)

    @stage.actor
    def pay():
        raise OSError

    pay.send()
    stage.run()
    assert stage.outcomes() == ["retried", "retried", "dead"]
    assert sentry.endings() == [("pay", "OSError", "retried")]
    assert sentry.events[0]["level"] == "warning"


def test_first_reports_an_alert_whenever_it_comes(sentry):
    sentry()
    stage = stage_with("first", **RULES)
    errors = [OSError, OSError, KeyError]

    @stage.actor
    def pay():
        raise errors.pop(0)

    pay.send()
    stage.run()
    assert sentry.endings() == [("pay", "OSError", "retried"), ("pay", "KeyError", "alerted")]


def test_every_reports_each_failed_attempt(either):
    sentry = either()
    stage = stage_with("every", **RULES)

    @stage.actor
    def pay():
        raise OSError("the same object each time is unlikely")

    pay.send()
    stage.run()
    assert [outcome for _, _, outcome in sentry.endings()] == ["retried", "retried", "dead"]
    assert [event["tags"]["attempt"] for event in sentry.events] == ["1", "2", "3"]


@pytest.mark.parametrize("report", ["final", "first", "every"])
def test_successes_snoozes_and_skips_are_nobodys_event(either, report):
    sentry = either()
    stage = stage_with(report)
    tries = []

    @stage.actor
    def pay():
        tries.append(1)
        if len(tries) == 1:
            raise Snooze(1)

    pay.send()
    stage.run()
    assert stage.outcomes() == ["deferred", "succeeded"]
    assert sentry.events == []


def test_a_body_that_can_t_be_read_is_reported(either):
    sentry = either()
    stage = stage_with()
    stage.broker.declare_queue("default")
    stage.broker.queues["default"].put(b"no json")
    stage.run()
    assert [event["tags"]["reason"] for event in sentry.events] == ["malformed"]


def message_with(**fields):
    return {
        "queue_name": "default",
        "actor_name": "pay",
        "args": [CARD],
        "kwargs": {"card": CARD},
        "options": {},
        **fields,
    }


def body_with(options):
    return json.dumps({**message_with(options=options), "message_id": "m", "message_timestamp": 1})


#: Bodies that carry an argument, and are not as they should be.
TELLTALE = {
    "no JSON": f"{{{CARD}",
    "no text": f"\udcff{CARD}",
    "more behind it": f"{body_with({})} more",
    "no message": json.dumps([CARD]),
    "a field too many": json.dumps(message_with(more=CARD)),
    "a field of another type": json.dumps(message_with(kwargs=CARD)),
    "a next stage that is none": body_with({"pipe_target": CARD}),
    "a next stage with a field too many": body_with({"pipe_target": message_with(more=1)}),
    "a next stage with a field of another type": body_with({"pipe_target": message_with(args=CARD)}),
    "a callback that is none": body_with({"group_completion_callbacks": [CARD], "group_completion_uuid": "g"}),
    "an option of Dramatiq's": body_with({"max_retries": [CARD]}),
    "a timeout": body_with({"timeout": CARD}),
    "a key": body_with({"idempotency_key": [CARD]}),
}


@pytest.mark.parametrize("body", TELLTALE.values(), ids=TELLTALE)
def test_the_content_of_a_malformed_message_is_in_no_log_line_and_no_event(sentry, caplog, body):
    sentry(include_local_variables=False)
    caplog.set_level(logging.INFO)  # At DEBUG Dramatiq itself logs all arguments.
    _warned.clear()
    limits._warned.clear()
    stage = stage_with("every")
    stage.actor(lambda *args, **kwargs: 1 / 0, actor_name="pay", max_retries=0)
    stage.broker.queues["default"].put(body.encode(errors="surrogateescape"))
    stage.run()
    assert stage.outcomes() == ["dead"]
    assert len(sentry.events) == 1
    seen = [
        caplog.text,
        sentry.events,
        [{**vars(record), "formatted": record.getMessage()} for record in caplog.records],
    ]
    assert CARD not in repr(seen)
    if stage.reasons() == ["malformed"]:
        # Nor could it be in a local variable.
        assert not sentry.events[0]["exception"]["values"][0].get("stacktrace")


def test_an_unknown_actor_is_reported_once(either):
    sentry = either()
    stage = stage_with()
    stage.broker.declare_queue("default")
    stage.broker.enqueue(dramatiq.Message("default", "gone", (), {}, {}))
    stage.run()
    assert [event["tags"]["reason"] for event in sentry.events] == ["unknown_actor"]


def test_a_message_that_the_broker_refuses_is_reported_once(either, monkeypatch):
    monkeypatch.setattr(publishing, "_RETRY_REFUSAL_FOR", 0.05)
    sentry = either()
    stage = stage_with(**RULES)

    @stage.actor
    def pay():
        raise OSError("down")

    pay.send()

    def refuse(*args, **kwargs):
        raise ValueError("too large")

    monkeypatch.setattr(stage.broker, "enqueue", refuse)
    stage.run()
    assert sentry.endings() == [("pay", "HandoffFailed", "dead")]
    assert [one["type"] for one in sentry.events[0]["exception"]["values"]] == ["ValueError", "HandoffFailed"]


def test_an_error_that_the_job_has_captured_itself_is_reported_with_its_outcome_all_the_same(either):
    sentry = either()
    stage = stage_with(discard_on=Unpaid)

    @stage.actor
    def pay():
        try:
            raise Unpaid
        except Unpaid:
            logging.getLogger("shop").exception("Could not take the money.")
            raise

    pay.send()
    stage.run()
    assert [event["logger"] for event in sentry.events] == ["shop", "dramatiq_policies"]


def test_without_a_client_nothing_happens():
    stage = stage_with(discard_on=Unpaid)

    @stage.actor
    def pay():
        raise Unpaid

    pay.send()
    stage.run()
    assert stage.outcomes() == ["discarded"]


# --- what is in an event --------------------------------------------------------------------------------------------


def test_an_event_names_the_job_and_its_outcome(either):
    sentry = either()
    stage = stage_with(**RULES)

    @stage.actor(queue_name="money", tags={"team": "billing"})
    def pay():
        raise Unpaid("order 7")

    pay.send_with_options(traceparent=TRACEPARENT)
    stage.run()
    [event] = sentry.events
    [record] = stage.events
    assert event["fingerprint"] == ["pay", f"{__name__}.Unpaid", "discarded"]
    assert event["tags"] == {
        "actor": "pay",
        "queue": "money",
        "outcome": "discarded",
        "attempt": "1",
        "rule": record.rule,
        "team": "billing",
        "traceparent": TRACEPARENT,
    }
    assert event["contexts"]["job"]["message_id"] == record.message_id
    assert event["transaction"] == "pay"


def test_the_stack_is_the_error_s_own_with_its_causes(either):
    sentry = either()
    stage = stage_with(discard_on=Unpaid)

    def charge():
        raise ConnectionError("the bank")

    @stage.actor
    def pay():
        try:
            charge()
        except ConnectionError as error:
            raise Unpaid from error

    pay.send()
    stage.run()
    cause, error = sentry.events[0]["exception"]["values"]
    assert [cause["type"], error["type"]] == ["ConnectionError", "Unpaid"]
    assert cause["stacktrace"]["frames"][-1]["function"] == "charge"
    assert error["stacktrace"]["frames"][-1]["function"] == "pay"


@pytest.mark.filterwarnings("ignore:The send_default_pii option is deprecated:DeprecationWarning")
def test_arguments_are_sent_only_where_sentry_may_have_them(either):
    for may in (False, True):
        sentry = either(send_default_pii=may, include_local_variables=False)
        stage = stage_with(discard_on=Unpaid, bundle={"discard_logger": False})

        @stage.actor
        def pay(order, card):
            logging.getLogger("shop").info("A breadcrumb.")
            raise Unpaid

        pay.send(7, card=CARD)
        stage.run()
        [event] = sentry.events
        assert (CARD in json.dumps(event)) is may
        assert event.get("extra", {}).get("job_kwargs") == ({"card": CARD} if may else None)


@pytest.mark.parametrize("name", ["Discard", "Own"])
def test_a_discard_raised_by_the_job_is_reported_like_any_other_ending(sentry, name):
    sentry()
    stage = stage_with()
    error = {"Discard": Discard, "Own": type("Own", (Discard,), {})}[name]

    @stage.actor
    def pay():
        raise error("already refunded")

    pay.send()
    stage.run()
    assert sentry.endings() == [("pay", name, "discarded")]


# --- scopes ---------------------------------------------------------------------------------------------------------


def breadcrumbs(event):
    return [crumb["message"] for crumb in event.get("breadcrumbs", {}).get("values", []) if crumb["category"] == "shop"]


def test_breadcrumbs_and_tags_of_one_job_do_not_show_up_in_the_next(either):
    sentry = either()
    stage = stage_with(discard_on=Unpaid)

    @stage.actor
    def pay(order, fails):
        logging.getLogger("shop").warning("Charging %s.", order)
        sentry_sdk.set_tag(f"order_{order}", "yes")
        if fails:
            raise Unpaid

    for order, fails in ((1, False), (2, True), (3, True)):
        pay.send(order, fails)
    stage.run()
    assert [breadcrumbs(event) for event in sentry.events] == [["Charging 2."], ["Charging 3."]]
    assert ["order_1" in event["tags"] for event in sentry.events] == [False, False]
    assert ["order_3" in event["tags"] for event in sentry.events] == [False, True]


def test_jobs_at_the_same_time_keep_their_breadcrumbs_apart(either):
    sentry = either()
    stage = stage_with(discard_on=Unpaid)
    together = threading.Barrier(4)

    @stage.actor
    def pay(order):
        for step in range(3):
            together.wait(10)
            logging.getLogger("shop").warning("Order %s, step %s.", order, step)
        raise Unpaid(order)

    for order in range(4):
        pay.send(order)
    stage.run(threads=4)
    assert len(sentry.events) == 4
    for event in sentry.events:
        order = event["exception"]["values"][-1]["value"]
        assert breadcrumbs(event) == [f"Order {order}, step {step}." for step in range(3)]


def test_the_tags_of_the_app_and_of_other_middleware_are_in_every_event(either):
    class Tenant(dramatiq.Middleware):
        def before_process_message(self, broker, message):
            sentry_sdk.set_tag("tenant", message.kwargs["tenant"])

    sentry = either()
    sentry_sdk.set_tag("service", "shop")
    stage = Stage(middleware=[Tenant()], bundle={"sentry": SentryReporter()}, discard_on=Unpaid)

    @stage.actor
    def pay(tenant):
        raise Unpaid

    for tenant in ("a", "b"):
        pay.send(tenant=tenant)
    stage.run()
    assert [(event["tags"]["service"], event["tags"]["tenant"]) for event in sentry.events] == [
        ("shop", "a"),
        ("shop", "b"),
    ]


def test_the_event_of_an_expired_message_has_nothing_of_the_job_before_it(either):
    sentry = either()
    stage = stage_with(discard_on=Unpaid)

    @stage.actor
    def pay():
        logging.getLogger("shop").warning("Charging.")

    @stage.actor(queue_timeout=1)
    def late():
        pass

    pay.send()
    late.send()
    time.sleep(0.01)
    stage.run()
    assert sentry.endings() == [("late", "QueueTimeoutExceeded", "expired")]
    assert breadcrumbs(sentry.events[0]) == []


def test_a_job_whose_after_hooks_never_ran_leaves_nothing_behind(sentry):
    sentry()
    stage = stage_with()
    reporter = next(middleware for middleware in stage.broker.middleware if isinstance(middleware, SentryReporter))
    around = sentry_sdk.get_isolation_scope()
    message = MessageProxy(dramatiq.Message("default", "pay", (), {}, {}))
    for _ in range(3_000):
        reporter.before_process_message(stage.broker, message)
    sentry_sdk.set_tag("order", "7")
    assert sentry_sdk.get_isolation_scope() is not around
    reporter.after_process_message(stage.broker, message)
    assert sentry_sdk.get_isolation_scope() is around
    assert "order" not in around._tags


def test_async_actors_are_reported_with_their_own_breadcrumbs(either):
    sentry = either()
    broker = StubBroker()
    broker.add_middleware(AsyncIO())
    stage = Stage(broker=broker, bundle={"sentry": SentryReporter()}, discard_on=Unpaid)

    @stage.actor
    async def pay(order):
        logging.getLogger("shop").warning("Charging %s.", order)
        raise Unpaid

    for order in (1, 2):
        pay.send(order)
    stage.run()
    assert [breadcrumbs(event) for event in sentry.events] == [["Charging 1."], ["Charging 2."]]
    frames = sentry.events[0]["exception"]["values"][-1]["stacktrace"]["frames"]
    assert frames[-1]["function"] == "pay"


# --- beside Sentry's own integration --------------------------------------------------------------------------------


def test_the_transactions_of_sentry_stay_and_name_the_failed_jobs(sentry):
    sentry(DramatiqIntegration(), traces_sample_rate=1.0)
    stage = stage_with(discard_on=Unpaid)

    @stage.actor
    def pay(error):
        if error == "unpaid":
            raise Unpaid
        if error == "later":
            raise Snooze(60_000)

    for error in ("", "unpaid", "later"):
        pay.send(error)
    with stage.working():
        stage.collected.wait_for(lambda events: len(events) == 3)
    statuses = [one["contexts"]["trace"]["status"] for one in sentry.transport.items("transaction")]
    assert statuses == ["ok", "internal_error", "ok"]
    assert len(sentry.events) == 1


def test_a_broker_of_its_own_without_ours_goes_on_reporting(sentry):
    sentry(DramatiqIntegration())
    install(StubBroker(), sentry=SentryReporter())
    broker = StubBroker()

    @dramatiq.actor(broker=broker, max_retries=0)
    def pay():
        raise Unpaid

    pay.send()
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=1)
    worker.start()
    broker.join("default", timeout=10_000, fail_fast=False)
    worker.stop()
    assert [event["exception"]["values"][-1]["mechanism"]["type"] for event in sentry.events] == ["dramatiq"]


def test_a_lower_event_level_makes_no_event_of_a_retry(sentry):
    sentry(LoggingIntegration(event_level=logging.WARNING))
    stage = stage_with(**RULES)

    @stage.actor
    def pay():
        raise OSError

    pay.send()
    stage.run()
    assert sentry.endings() == [("pay", "OSError", "dead")]


# --- stuck jobs -----------------------------------------------------------------------------------------------------


@pytest.mark.untraced
def test_a_stuck_job_is_reported_once_with_where_it_is(either):
    sentry = either()
    stage = stage_with(bundle={"timeout": Timeout(default=50, grace=50)})

    def wait_for_the_bank():
        time.sleep(0.5)

    @stage.actor(max_retries=0, tags={"team": "billing"})
    def pay():
        wait_for_the_bank()

    pay.send()
    stage.run()
    assert sentry.endings() == [("pay", "StuckJob", "stuck"), ("pay", "TimeoutExceeded", "dead")]
    stuck = sentry.events[0]
    assert stuck["level"] == "fatal"
    assert stuck["tags"]["team"] == "billing"
    assert stuck["fingerprint"] == ["pay", "StuckJob", "stuck"]
    assert stuck["exception"]["values"][0]["stacktrace"]["frames"][-1]["function"] == "wait_for_the_bank"


# --- over the wire --------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint():
    with SentryEndpoint.server() as server:
        yield server


SCRIPT = """
    import os, time
    import dramatiq, sentry_sdk
    from dramatiq import Worker
    from dramatiq.brokers.stub import StubBroker
    from sentry_sdk.integrations.dramatiq import DramatiqIntegration
    from dramatiq_policies import SentryReporter, Timeout, install

    sentry_sdk.init(os.environ["SENTRY_DSN"], integrations=[DramatiqIntegration()])
    timeout = Timeout(default=50, grace=50, on_stuck="exit")
    broker = install(StubBroker(), sentry=SentryReporter(), timeout=timeout)

    @dramatiq.actor(broker=broker, max_retries=0)
    def pay(how):
        if how == "stuck":
            time.sleep(20)
        raise OSError("the bank is down")

    pay.send(os.environ["HOW"])
    worker = Worker(broker, worker_threads=1, worker_timeout=50)
    worker.start()
    broker.join("default", timeout=10_000, fail_fast=False)
    worker.stop()
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("how", "code", "kind"),
    [
        pytest.param("fails", 0, "OSError", id="a failure"),
        pytest.param("stuck", 70, "StuckJob", id="a stuck job", marks=pytest.mark.untraced),
    ],
)
def test_an_event_reaches_its_server_before_the_process_ends(endpoint, how, code, kind):
    environment = {**os.environ, "SENTRY_DSN": f"http://key@127.0.0.1:{endpoint.server_port}/1", "HOW": how}
    script = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    ended = subprocess.run(script, timeout=60, env=environment, check=False)
    assert ended.returncode == code
    events = SentryEndpoint.events_of(endpoint)
    assert [event["exception"]["values"][-1]["type"] for event in events] == [kind]
    assert events[0]["tags"]["actor"] == "pay"


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", ["last", None, True])
def test_a_report_of_another_kind_is_a_mistake(report):
    with pytest.raises(ConfigurationError, match="report"):
        SentryReporter(report=report)


def test_the_error_without_sentry_sdk_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentry_sdk", None)
    with pytest.raises(ImportError, match=r'pip install "dramatiq-policies\[sentry\]"'):
        SentryReporter()


# --- what the SDK may be without ------------------------------------------------------------------------------------


def test_a_job_s_scope_has_no_attribute_that_sentry_s_has_not():
    scope = object.__new__(sentry_patches.job_scope(sentry_sdk.Scope))
    with pytest.raises(AttributeError, match="no_such_thing"):
        scope.no_such_thing  # noqa: B018


def test_the_scope_of_a_job_keeps_its_own_fields_over_those_of_the_scope_around_it():
    class Scope:
        __slots__ = ("crumbs", "tags", "unset_in_a_copy")

        def fork(self):
            fork = Scope()
            fork.crumbs, fork.tags = ["theirs"], {"from": "around"}
            return fork

        def clear_breadcrumbs(self):
            self.crumbs = []

    scope = sentry_patches.job_scope(Scope)()
    scope.around = Scope()
    scope.tags = {"from": "the job"}
    assert scope.crumbs == []
    assert scope.tags == {"from": "the job"}
    with pytest.raises(AttributeError, match="unset_in_a_copy"):
        scope.unset_in_a_copy  # noqa: B018


def test_an_ending_is_reported_without_the_dedupe_integration_too(sentry):
    sentry(default_integrations=False)
    stage = stage_with()
    pay = stage.actor(lambda: 1 / 0, actor_name="pay", max_retries=0)
    pay.send()
    stage.run()
    assert sentry.endings() == [("pay", "ZeroDivisionError", "dead")]


class Before220:
    """A span as the SDK had it: its status was an attribute."""


def processed_beside_sentry_s_own(delivery, error):
    """Run Sentry's own middleware; return the errors passed to it, and the span of the message."""
    told = []

    class Theirs(Middleware):
        __module__ = "sentry_sdk.integrations.dramatiq"

        def after_process_message(self, broker, message, *, result=None, exception=None):
            told.append(exception)

    theirs = Theirs()
    sentry_patches.quieten(theirs)
    message = MessageProxy(dramatiq.Message("default", "pay", (), {}, {}))
    message._sentry_span_ctx = Before220()
    if delivery is not None:
        message.delivery = delivery
    theirs.after_process_message(StubBroker(), message, exception=error)
    return told, message._sentry_span_ctx


def test_a_span_of_an_old_sdk_says_that_the_job_failed():
    told, span = processed_beside_sentry_s_own(SimpleNamespace(decision=None), Unpaid())
    assert told == [None]
    assert span.status == "error"


def test_a_message_that_is_none_of_ours_is_reported_by_sentry_s_own():
    error = Unpaid()
    told, span = processed_beside_sentry_s_own(None, error)
    assert told == [error]
    assert not hasattr(span, "status")


def test_an_ending_without_an_error_is_reported_by_its_outcome(sentry):
    sentry()
    stage = stage_with()
    state_of(stage.broker).outcomes.publish(OutcomeEvent(outcome=Outcome.DEAD, reason="malformed", actor="pay"), None)
    (event,) = sentry.events
    assert event["message"] == "dead: a message of actor pay"
    assert event["fingerprint"] == ["pay", "", "dead"]


def test_a_stuck_job_is_sent_only_to_a_client(sentry):
    stage = stage_with()
    job = StuckJob(actor="pay", queue="default", message_id="m1", elapsed_ms=70.0, stack=STACK)
    for tell in state_of(stage.broker).outcomes.stuck_subscribers:
        tell(job)
    sentry()
    for tell in state_of(stage.broker).outcomes.stuck_subscribers:
        tell(job)
    (event,) = sentry.events
    assert event["exception"]["values"][0]["value"] == "stuck for 70 ms; can't be interrupted"
    assert [frame["function"] for frame in event["exception"]["values"][0]["stacktrace"]["frames"]] == ["pay"]
