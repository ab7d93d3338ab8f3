"""`dramatiq-policies explain`: what it says is what then happens."""

from __future__ import annotations

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import Snooze, install, ops
from dramatiq_policies.ops.checks.actor_source import source_of
from dramatiq_policies.testing import drain, fail

APP = """
class Timeout_(OSError): pass
class Gone(Exception): pass
class NoKey(Exception): pass
class API(Exception):
    status = 500

def busy(error):
    return error.status == 429

@dramatiq.actor(
    queue_name="mail", timeout=30_000, tags={"team": "shop"},
    retry_on={Timeout_: RetryPolicy(attempts=4, wait=exponential(initial=1_000, jitter=0.5)),
              when(API, busy): RetryPolicy(attempts=2, wait=constant(9_000), then="alert"),
              ConnectionError: RetryPolicy(attempts=9, wait=constant(1_000), max_elapsed=3_500)},
    discard_on=(Gone, API), alert_on=NoKey,
)
def send_mail(order_id):
    "Tells the customer."

@dramatiq.actor(max_retries=2, min_backoff=1_000, throws=KeyError)
def plain(): pass

class Refused(Verdict): pass

@dramatiq.actor(max_retries=0)
def once(): pass
"""


@pytest.fixture
def app(command):
    return command.app(APP)


def explained(command, target, *exception):
    return command.json("explain", target, *exception)


def times(answer):
    return [(one["number"], one["earliest_ms"], one["latest_ms"]) for one in answer["attempts"]]


def test_retries_are_a_timeline_with_earliest_and_latest_starts(command, app):
    (answer,) = explained(command, f"{app}:send_mail", "Timeout_")
    assert (answer["outcome"], answer["ending"], answer["reason"]) == ("retried", "dead", "exhausted")
    assert times(answer) == [(1, 0, 0), (2, 1_000, 1_500), (3, 3_000, 4_500), (4, 7_000, 10_500)]
    assert answer["longest_ms"] == 10_500 + 4 * 30_000
    assert answer["where_it_ends"] == "the dead letters of mail"
    assert answer["why"] == "the actor's retry_on names its class"


def test_no_attempt_starts_after_max_elapsed(command, app):
    (answer,) = explained(command, f"{app}:send_mail", "ConnectionResetError")
    assert [one[0] for one in times(answer)] == [1, 2, 3, 4]
    assert answer["longest_ms"] == 3_500 + 2 * 30_000
    assert answer["why"] == ("the actor's retry_on names ConnectionError, the nearest of its base classes with a rule")


def test_a_when_is_asked_first_and_then_the_bare_class(command, app):
    narrow, bare = explained(command, f"{app}:send_mail", f"{app}.API")
    assert (narrow["only_if"], narrow["outcome"], narrow["ending"]) == ("busy", "retried", "alerted")
    assert (bare["only_if"], bare["outcome"], bare["where_it_ends"]) == (None, "discarded", "gone")


def test_alerts_and_verdicts_end_at_once(command, app):
    (alert,) = explained(command, f"{app}:send_mail", f"{app}:NoKey")
    assert (alert["outcome"], alert["where_it_ends"]) == ("alerted", "the dead letters of mail")
    (discard,) = explained(command, f"{app}:send_mail", "dramatiq_policies.Discard")
    assert discard["outcome"] == "discarded"
    (snooze,) = explained(command, f"{app}:send_mail", "dramatiq_policies.Snooze")
    assert snooze["outcome"] == "deferred"
    (shutdown,) = explained(command, f"{app}:send_mail", "dramatiq.middleware:Shutdown")
    assert shutdown["outcome"] == "interrupted"


def test_an_error_that_no_rule_names_goes_by_dramatiq_s_options(command, app):
    (answer,) = explained(command, f"{app}:plain", "ValueError")
    assert times(answer) == [(1, 0, 0), (2, 1_000, 2_000), (3, 3_000, 6_000)]
    (thrown,) = explained(command, f"{app}:plain", "KeyError")
    assert (thrown["outcome"], thrown["reason"]) == ("dead", "thrown")


def test_the_waits_of_production_are_within_the_bounds(command, app):
    actor = ops.find_actor(f"{app}:send_mail")
    (answer,) = ops.explain(actor, ops.find_exception(actor, "Timeout_"))
    policy = next(rule.policy for rule in actor.broker.dramatiq_policies_state.policies["send_mail"].rules.rules)
    for _ in range(500):
        start = 0
        for attempt in answer.attempts[1:]:
            start += policy.wait(attempt.number - 1, OSError())
            assert attempt.earliest_ms <= start <= attempt.latest_ms


@pytest.mark.parametrize(
    ("actor", "error"),
    [
        ("send_mail", "Timeout_"),
        ("send_mail", "ConnectionError"),
        ("send_mail", "Gone"),
        ("send_mail", "NoKey"),
        ("send_mail", "Snooze"),
        ("plain", "ValueError"),
        ("plain", "KeyError"),
        ("plain", "Refused"),
        ("once", "dramatiq.middleware:Shutdown"),
    ],
)
def test_an_explanation_matches_the_run_of_the_job(command, app, actor, error):
    found = ops.find_actor(f"{app}:{actor}")
    cls = ops.find_exception(found, error)
    (answer,) = ops.explain(found, cls)
    with fail(found, Snooze(1_000) if error == "Snooze" else cls("said"), times=1 if error == "Snooze" else None):
        found.send(*((7,) if actor == "send_mail" else ()))
        run = drain(found.broker)
    outcomes = run.outcomes(found)
    assert outcomes[0] == answer.outcome
    if error != "Snooze":
        assert outcomes == ["retried"] * (len(answer.attempts) - 1) + [answer.ending]
        assert run.reasons(found)[-1] == answer.reason
        assert bool(run.dead) == (answer.where_it_ends != "gone")
    start = 0
    for wait, attempt in zip(run.waits(found), answer.attempts[1:], strict=error != "Snooze"):
        start += wait
        # Runs take no virtual time, but a little of the real one.
        assert attempt.earliest_ms <= start <= attempt.latest_ms


def test_without_an_exception_it_shows_the_whole_policy(command, app):
    shown = explained(command, f"{app}:send_mail")
    assert (shown["actor"], shown["queue"], shown["purpose"]) == ("send_mail", "mail", "Tells the customer.")
    assert shown["facts"]["timeout"] == "30 s"
    assert shown["facts"]["tags"] == "team=shop"
    assert [(rule["verb"], rule["error"].rpartition(".")[2]) for rule in shown["rules"]] == [
        ("retry", "Timeout_"),
        ("retry", "API"),
        ("retry", "ConnectionError"),
        ("discard", "Gone"),
        ("discard", "API"),
        ("alert", "NoKey"),
    ]


def test_people_read_it_as_sentences(command, app):
    shown = command("explain", f"{app}:send_mail", "Timeout_").stdout
    assert f"{app}.Timeout_ in send_mail: retried" in shown
    assert "then dead (exhausted): in the dead letters of mail" in shown
    assert "at most 2 m 10 s after the first start" in shown
    assert "exponential(initial=1 s, maximum=7 d" in command("explain", f"{app}:send_mail").stdout


def test_an_actor_or_error_that_does_not_exist_is_one_sentence(command, app):
    assert "did you mean 'send_mail'" in command.refuses("explain", f"{app}:send_mial")
    assert "names no actor" in command.refuses("explain", app)
    assert "is not an exception class" in command.refuses("explain", f"{app}:plain", "NoSuchError")
    assert "can't be imported" in command.refuses("explain", f"{app}:plain", "no.such.Error")


@pytest.mark.parametrize("separator", [".", ":"])
def test_a_misspelt_error_of_a_module_gets_the_nearest_name(command, app, separator):
    line = command.refuses("explain", f"{app}:plain", f"http.client{separator}BadStatusLin")
    assert line == "Error: http.client has no exception class 'BadStatusLin'; did you mean 'BadStatusLine'?"
    assert f"did you mean '{app}'" in command.refuses("explain", f"{app}:plain", f"{app}x{separator}Timeout_")


def test_actors_of_a_factory_s_broker_go_by_their_names(command):
    factory = """
def make():
    broker = StubBroker()
    install(broker)
    dramatiq.set_broker(broker)
    @dramatiq.actor(actor_name="inner")
    def anything(): pass
"""
    app = command.app("", broker=factory)
    assert explained(command, f"{app}:make:inner")["actor"] == "inner"


MORE = """
from dramatiq_policies import Idempotency

@dramatiq.actor(max_retries=None)
def endless(): pass

@dramatiq.actor(retry_when=lambda retries, error: retries < 3)
def asks(): pass

@dramatiq.actor(throws=KeyError, max_retries=5, tags={"team": "shop"}, policy_exempt={"DP002": "it is a report"})
def thrower(): pass

@dramatiq.actor(discard_on=dramatiq.errors.DramatiqError, time_limit=float("inf"), done_when=lambda: True)
def done(): pass

@dramatiq.actor(idempotent=True)
def once(): pass

@dramatiq.actor(broker=StubBroker())
def elsewhere(): pass
"""


@pytest.fixture
def more(command):
    return command.app(MORE)


@pytest.mark.parametrize(
    ("actor", "why"), [("endless", "max_retries is None"), ("asks", "retry_when decides each time")]
)
def test_a_retry_without_a_known_end_is_reported_so(command, more, actor, why):
    (answer,) = explained(command, f"{more}:{actor}", "ValueError")
    assert (answer["outcome"], answer["complete"]) == ("retried", False)
    assert why in answer["why"]
    assert (
        "number and times of the attempts: not known in advance"
        in command("explain", f"{more}:{actor}", "ValueError").stdout
    )


def test_an_error_in_throws_is_dead_at_once(command, more):
    (answer,) = explained(command, f"{more}:thrower", "KeyError")
    assert (answer["outcome"], answer["reason"]) == ("dead", "thrown")
    assert "the message is then in" in command("explain", f"{more}:thrower", "KeyError").stdout


def test_dramatiq_s_retry_is_no_error_that_a_rule_discards(command, more):
    assert explained(command, f"{more}:done", "dramatiq.errors.DramatiqError")[0]["outcome"] == "discarded"
    assert explained(command, f"{more}:done", "dramatiq.errors.Retry")[0]["outcome"] == "retried"


def test_an_actor_s_summary_shows_its_tags_its_exemptions_and_the_fate_of_a_duplicate(command, more):
    facts = command.json("explain", f"{more}:thrower")["facts"]
    assert (facts["tags"], facts["exempt"]) == ("team=shop", "DP002: it is a report")
    assert facts["a duplicate"] == "runs again: no option of the actor prevents the second run"
    assert "unless done_when returns true" in command.json("explain", f"{more}:done")["facts"]["a duplicate"]
    assert "a duplicate is only the same message id" in command.json("explain", f"{more}:once")["facts"]["a duplicate"]


def test_an_actor_on_a_broker_without_dramatiq_policies_is_refused(command, more):
    assert "on a broker without dramatiq_policies" in command.refuses("explain", f"{more}:elsewhere", "KeyError")


def test_where_unclassified_decides_it_is_named(command):
    app = command.app(
        "@dramatiq.actor(throws=KeyError)\ndef pay(): pass\n",
        broker="broker = StubBroker()\n"
        "rules = ErrorClassifier(unclassified=RetryPolicy(attempts=2, wait=constant(1_000)))\n"
        "install(broker, error_classifier=rules)\ndramatiq.set_broker(broker)\n",
    )
    (answer,) = explained(command, f"{app}:pay", "ValueError")
    assert "unclassified= applies" in answer["why"]
    assert len(answer["attempts"]) == 2
    assert explained(command, f"{app}:pay", "KeyError")[0]["reason"] == "thrown"


def test_an_error_that_no_rule_names_is_dead_at_once_without_retries(command):
    app = command.app("@dramatiq.actor(max_retries=0)\ndef pay(): pass\n")
    (answer,) = explained(command, f"{app}:pay", "ValueError")
    assert (answer["outcome"], answer["reason"]) == ("dead", "unclassified")


def test_a_bare_actor_has_neither_a_purpose_nor_rules_to_show(command):
    app = command.app("@dramatiq.actor\ndef bare(): pass")
    lines = command("explain", f"{app}:bare").stdout.splitlines()
    assert lines[0].startswith("bare on default")
    assert lines[1] == ""
    assert "declared by" not in "".join(lines)


def test_a_predicate_with_arguments_bound_goes_by_the_name_of_its_function(command):
    app = command.app("""
        import functools
        def is_status(status, error): return error.status == status
        @dramatiq.actor(discard_on=when(OSError, functools.partial(is_status, 404)))
        def get(): pass
    """)
    (rule,) = command.json("explain", f"{app}:get")["rules"]
    assert rule["only_if"] == "is_status"
    found = explained(command, f"{app}:get", "OSError")[0]
    assert (found["outcome"], found["rule"]) == ("discarded", "builtins.OSError?is_status")


def test_a_class_that_is_no_exception_is_refused(command):
    app = command.app("class Plain: pass\n@dramatiq.actor\ndef get(): pass")
    assert "is not an exception class; write it as module:Class" in command.refuses(
        "explain", f"{app}:get", f"{app}:Plain"
    )


def test_a_job_of_a_class_without_source_has_no_file_and_line():
    made = {}
    exec("class Job:\n    def __call__(self): pass", made)
    actor = dramatiq.actor(made["Job"](), actor_name="job", broker=install(StubBroker()))
    assert source_of(actor) == (None, None)
