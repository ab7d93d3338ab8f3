"""`dramatiq-policies check`: each finding is there when it should be, and not when it should not."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest

from dramatiq_policies import Timeout, constant
from dramatiq_policies.ops import CODES, check_actor, find_actor, load_broker
from dramatiq_policies.testing import assert_job_ready

ROOT = Path(__file__).parents[2]
PREPARED = """
@dramatiq.actor(queue_name="mail", retry_on=ConnectionError, discard_on=ValueError, timeout=30_000,
                tags={"team": "shop"}, policy_exempt={"DP006": "asked of the gateway"})
def send_mail(order_id):
    "Tells the customer."
"""

BOUNDED = """
broker = StubBroker()
install(broker, error_classifier=ErrorClassifier(unclassified=RetryPolicy(attempts=5)))
dramatiq.set_broker(broker)
"""


def job(options="", body='"Does something."', **replaced):
    """A job that is ready but for what a test changes."""
    given = {
        "queue_name": '"mail"',
        "retry_on": "ConnectionError",
        "discard_on": "ValueError",
        "timeout": "30_000",
        "policy_exempt": '{"DP006": "asked of the gateway"}',
        **replaced,
    }
    listed = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    return f"\n@dramatiq.actor({listed}, {options})\ndef send_mail(order_id):\n    {body}\n"


def codes(report):
    return [finding["code"] for finding in report["findings"] if finding["severity"] == "error"]


def test_a_job_that_is_ready_passes(command):
    result = command("check", command.app(PREPARED))
    assert result.exit_code == 0
    assert "Ready: 1 actor, 0 errors" in result.stdout
    assert "DP006 send_mail: asked of the gateway" in result.stdout


def test_a_bare_actor_has_every_fault_of_design_and_fails(command):
    app = command.app("@dramatiq.actor\ndef charge(order_id):\n    pass\n")
    report = command.json("check", app, code=1)
    assert codes(report) == ["DP001", "DP002", "DP004", "DP005", "DP006", "DP007"]
    assert report["ok"] is False
    finding = report["findings"][-1]
    assert finding["actor"] == "charge"
    assert finding["file"] == f"{app}.py"
    assert (command.folder / finding["file"]).read_text().splitlines()[finding["line"] - 1] == "@dramatiq.actor"


@pytest.mark.parametrize(
    ("code", "changed"),
    [
        ("DP001", {"retry_on": None}),
        ("DP002", {"discard_on": None}),
        ("DP003", {"max_retries": "None"}),
        ("DP003", {"retry_when": "lambda retries, error: True"}),
        ("DP004", {"timeout": None}),
        ("DP004", {"timeout": 'float("inf")'}),
        ("DP005", {"queue_name": None}),
        ("DP006", {"policy_exempt": None}),
        ("DP007", {"body": "pass"}),
        ("DP014", {"on_retry_exhausted": '"nobody"'}),
        ("DP014", {"on_failure": '"nobody"'}),
        ("DP015", {"timeout": "601_000"}),
        ("DP011", {"retry_on": "[when(OSError, bool), when(OSError, bool)]"}),
        ("DP020", {"body": '"Does something."\nimport asyncio\nasync def wait():\n    "Waits."\nasync_job(wait)'}),
    ],
)
def test_each_fault_is_found_by_its_code(command, code, changed):
    body = changed.pop("body", '"Does something."')
    helper = 'def async_job(fn):\n    dramatiq.actor(queue_name="q", policy_exempt={"DP006": "no"}, retry_on=(), discard_on=(), timeout=5)(fn)\n'
    source = job(body=body.partition("\nimport")[0], **changed)
    if "async_job" in body:
        source += helper + body.partition('."\n')[2]
    assert codes(command.json("check", command.app(source), code=1)) == [code]


def test_declaring_that_there_are_none_is_an_answer(command):
    assert codes(command.json("check", command.app(job(retry_on="()", discard_on="()")))) == []


def test_rules_and_a_timeout_for_the_whole_broker_count(command):
    broker = """
broker = StubBroker()
install(broker, error_classifier=ErrorClassifier(retry_on=ConnectionError, discard_on=ValueError),
        timeout=Timeout(default=30_000))
dramatiq.set_broker(broker)
"""
    app = command.app(job(retry_on=None, discard_on=None, timeout=None), broker=broker)
    assert codes(command.json("check", app)) == []


def test_a_short_lease_is_found(command):
    broker = """
broker = StubBroker()
install(broker, idempotency=Idempotency(lease=%d))
dramatiq.set_broker(broker)
"""
    keyed = job(policy_exempt=None, idempotency_key='"order:{order_id}"')
    assert codes(command.json("check", command.app(keyed, broker=broker % 5_000), code=1)) == ["DP009"]
    assert codes(command.json("check", command.app(keyed, broker=broker % 30_000))) == []
    assert codes(command.json("check", command.app(job(), broker=broker % 5_000))) == []


def test_a_memory_that_is_one_process_s_own_is_found(command):
    broker = """
from dramatiq.brokers.redis import RedisBroker
from dramatiq_policies.stores.memory import MemoryStore
broker = RedisBroker(url="redis://127.0.0.1:1/0")
install(broker, idempotency=Idempotency(MemoryStore()))
dramatiq.set_broker(broker)
"""
    assert codes(command.json("check", command.app(job(), broker=broker), code=1)) == ["DP024"]


def test_retries_that_outlive_the_memory_of_a_key_are_found(command):
    rule = "{ConnectionError: RetryPolicy(attempts=4, wait=constant(60_000))}"
    keyed = {"policy_exempt": None, "idempotency_key": '"order:{order_id}"', "retry_on": rule}
    assert codes(command.json("check", command.app(job(idempotency_ttl="179_999", **keyed)), code=1)) == ["DP010"]
    assert codes(command.json("check", command.app(job(idempotency_ttl="180_000", **keyed)))) == []


def test_a_broker_s_rule_that_beats_the_actor_s_wider_one_is_found(command):
    broker = """
broker = StubBroker()
install(broker, error_classifier=ErrorClassifier(discard_on=["builtins.ConnectionRefusedError"]))
dramatiq.set_broker(broker)
"""
    report = command.json("check", command.app(job(retry_on="OSError"), broker=broker), code=1)
    assert codes(report) == ["DP012"]
    assert "ConnectionRefusedError is a OSError (retry, by the actor)" in report["findings"][-1]["message"]
    mended = command.app(job(retry_on="OSError", broker_rules="False"), broker=broker)
    assert codes(command.json("check", mended)) == []


def test_a_broker_s_rule_that_retries_less_than_the_actor_s_wider_one_is_found(command):
    broker = """
broker = StubBroker()
install(broker, error_classifier=ErrorClassifier(retry_on={{ConnectionRefusedError: {}}}))
dramatiq.set_broker(broker)
"""
    actor = job(retry_on="{OSError: 5}")
    assert codes(command.json("check", command.app(actor, broker=broker.format(2)), code=1)) == ["DP012"]
    assert codes(command.json("check", command.app(actor, broker=broker.format(5)))) == []


def test_an_actor_that_replaces_a_broker_s_rule_is_as_it_should_be(command):
    broker = """
broker = StubBroker()
install(broker, error_classifier=ErrorClassifier(discard_on=ConnectionError))
dramatiq.set_broker(broker)
"""
    assert codes(command.json("check", command.app(job(), broker=broker))) == []


def test_a_dotted_rule_that_leads_nowhere_is_found(command):
    broker = """
broker = StubBroker()
install(broker, error_classifier=ErrorClassifier(discard_on=["builtins.NoSuchError"]))
dramatiq.set_broker(broker)
"""
    assert codes(command.json("check", command.app(job(), broker=broker), code=1)) == ["DP023"]


def test_a_subclass_of_the_stock_retries_beside_ours_is_found(command):
    broker = """
class Mine(dramatiq.middleware.Retries):
    pass
broker = StubBroker()
broker.add_middleware(Mine())
install(broker)
dramatiq.set_broker(broker)
"""
    report = command.json("check", command.app(job(), broker=broker), code=1)
    assert codes(report) == ["DP013"]
    assert report["findings"][0]["actor"] is None


def test_the_stock_time_limit_is_right_where_there_is_no_timeout_of_ours(command):
    broker = """
broker = StubBroker()
broker.add_middleware(ErrorClassifier())
dramatiq.set_broker(broker)
"""
    app = command.app(job(timeout=None, time_limit="30_000"), broker=broker)
    assert "DP013" not in codes(command.json("check", app, code=1))


@pytest.mark.parametrize("name", ["Callbacks", "Pipelines"])
def test_a_middleware_that_sends_everything_twice_is_found(command, name):
    broker = f"""
broker = StubBroker()
broker.add_middleware(dramatiq.middleware.{name}())
install(broker)
dramatiq.set_broker(broker)
"""
    report = command.json("check", command.app(job(), broker=broker), code=1)
    assert codes(report) == ["DP013"]
    assert f"two {name}" in report["findings"][0]["message"]


@pytest.mark.parametrize("name", ["Pipelines", "ShutdownNotifications"])
def test_a_subclass_of_a_stock_middleware_that_ours_can_t_replace_is_a_warning(command, name):
    broker = f"""
class Mine(dramatiq.middleware.{name}):
    pass
broker = StubBroker(middleware=[Mine()])
install(broker)
dramatiq.set_broker(broker)
"""
    report = command.json("check", command.app(job(), broker=broker))
    assert ("DP025", "warning") in {(finding["code"], finding["severity"]) for finding in report["findings"]}


def test_an_extra_that_is_not_installed_is_found_with_its_pip_line(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "statsd", None)
    broker = """
from dramatiq_policies import Metrics
broker = StubBroker()
install(broker, metrics=Metrics(%s))
dramatiq.set_broker(broker)
"""
    report = command.json("check", command.app(job(), broker=broker % ""), code=1)
    assert codes(report) == ["DP021"]
    assert 'pip install "dramatiq-policies[statsd]"' in report["findings"][0]["message"]
    # A client of the user's own needs none.
    client = "type('Dog', (), dict.fromkeys(('timing', 'increment', 'gauge', 'histogram', 'distribution'), print))()"
    assert codes(command.json("check", command.app(job(), broker=broker % client))) == []


def test_an_application_without_dramatiq_policies_is_refused_with_a_sentence(command):
    app = command.app("@dramatiq.actor\ndef charge(): pass\n", broker="dramatiq.set_broker(StubBroker())\n")
    assert codes(command.json("check", app, code=1)) == ["DP022"]


def test_a_meta_that_has_lost_its_base_s_options_is_found(command):
    source = """
    RULES = {"queue_name": "billing", "retry_on": ConnectionError, "discard_on": ValueError, "timeout": 5_000,
             "policy_exempt": {"DP006": "no effect"}}

    class Job(dramatiq.GenericActor):
        Meta = type("Meta", (), {"abstract": True, **RULES})

    class Whole(Job):
        "Has all of it."
        def perform(self): ...

    class Lost(Job):
        "Has lost it."
        class Meta(Job.Meta):
            priority = 5
        def perform(self): ...
    """
    report = command.json("check", command.app(source), code=1)
    assert {finding["actor"] for finding in report["findings"] if finding["severity"] == "error"} == {"Lost"}
    (lost,) = [finding for finding in report["findings"] if finding["code"] == "DP016"]
    assert lost["message"] == "Meta lacks the inherited discard_on, policy_exempt, queue_name, retry_on, timeout"


def test_a_class_s_purpose_is_its_own_docstring_or_perform_s(command):
    source = """
    class Job(dramatiq.GenericActor):
        class Meta:
            queue_name, retry_on, discard_on, timeout = "q", (), (), 5_000
            policy_exempt = {"DP006": "no effect"}
        def perform(self):
            %s
    """
    assert codes(command.json("check", command.app(source % '"Books."'))) == []
    assert codes(command.json("check", command.app(source % "pass"), code=1)) == ["DP007"]


def test_required_tags_are_checked(command):
    app = command.app(PREPARED)
    assert command("check", app, "--require-tag", "team").exit_code == 0
    report = command.json("check", app, "--require-tag", "team", "--require-tag", "criticality", code=1)
    assert [finding["message"] for finding in report["findings"] if finding["code"] == "DP008"] == [
        "The actor has no tag 'criticality'"
    ]


def test_an_alert_without_a_subscriber_is_a_warning(command):
    silent = "import logging\nlogging.getLogger('dramatiq_policies.alerts').disabled = %s\n"
    app = command.app(silent % True + job(alert_on="KeyError"))
    heard = command.app(silent % False + job(alert_on="KeyError"))
    assert "DP018" in command("check", app).stdout
    alone = "logging.getLogger('dramatiq_policies.alerts').propagate = %s\n"
    apart = command.app(silent % False + alone % False + job(alert_on="KeyError"))
    assert "DP018" in command("check", apart).stdout
    logging.getLogger("dramatiq_policies.alerts").propagate = True
    reported = "broker = StubBroker()\ninstall(broker, sentry=SentryReporter())\ndramatiq.set_broker(broker)\n"
    assert (
        "DP018" not in command("check", command.app(silent % True + job(alert_on="KeyError"), broker=reported)).stdout
    )
    assert "DP018" not in command("check", heard).stdout


def test_warnings_fail_only_if_asked_to(command):
    app = command.app(PREPARED)
    assert "DP019 warning" in command("check", app).stdout
    assert command("check", app, "--strict").exit_code == 1


def test_an_exemption_without_a_reason_is_no_exemption(command):
    assert "reason" in command.refuses("check", command.app(job(policy_exempt='{"DP006": " "}')))
    app = command.app(PREPARED, broker=BOUNDED)
    assert command.refuses("check", app, "--ignore", "DP019") == "Error: --ignore needs a --reason."
    two = ("--ignore", "DP019", "--ignore", "DP006", "--ignore", "DP005", "--reason", "x", "--reason", "y")
    assert "pass one reason for each, or one for all" in command.refuses("check", app, *two)
    assert "no finding 'DP999'" in command.refuses("check", app, "--ignore", "DP999", "--reason", "x")
    assert "did you mean" in command.refuses("check", app, "--ignore", "DP02", "--reason", "x")
    result = command("check", app, "--strict", "--ignore", "DP019", "--reason", "watched elsewhere")
    assert result.exit_code == 0
    assert "DP019 the broker: watched elsewhere" in result.stdout


def test_exemptions_may_stand_in_pyproject(command):
    app = command.app(job(queue_name=None, policy_exempt=None))
    (command.folder / "pyproject.toml").write_text(
        '[tool.dramatiq_policies.exempt]\nDP005 = "one queue is enough"\n'
        '[tool.dramatiq_policies.exempt.send_mail]\nDP006 = "no effect"\n'
    )
    report = command.json("check", app)
    assert {(finding["code"], finding["exempt"]) for finding in report["exempt"]} == {
        ("DP005", "one queue is enough"),
        ("DP006", "no effect"),
    }
    (command.folder / "pyproject.toml").write_text('[tool.dramatiq_policies.exempt]\nDP005 = ""\n')
    assert "DP005: an exemption needs a reason" in command.refuses("check", app)


def test_a_baseline_lets_the_old_pass_and_the_new_fail(command):
    app = command.app("@dramatiq.actor\ndef old(): pass\n")
    assert command("check", app, "--write-baseline").exit_code == 0
    assert command("check", app).exit_code == 0
    source = (command.folder / f"{app}.py").read_text()
    (command.folder / "app_newer.py").write_text(source + "\n@dramatiq.actor\ndef new(): pass\n")
    report = command.json("check", "app_newer", code=1)
    assert {finding["actor"] for finding in report["findings"] if finding["severity"] == "error"} == {"new"}
    assert {finding["actor"] for finding in report["baseline"]} == {"old", None}


def test_a_fixed_finding_is_reported_as_still_in_the_baseline(command):
    command("check", command.app("@dramatiq.actor\ndef send_mail(): pass\n"), "--write-baseline")
    result = command("check", command.app(PREPARED))
    assert result.exit_code == 0
    assert re.search(r"\d entries of the baseline are fixed", result.stdout)


def test_github_shows_findings_at_their_lines(command):
    app = command.app("@dramatiq.actor\ndef charge():\n    '50%'\n")
    result = command("check", app, "--format", "github")
    assert result.exit_code == 1
    line = next(line for line in result.stdout.splitlines() if "DP001" in line)
    assert re.fullmatch(rf"::error file={app}\.py,line=\d+,title=DP001::charge: No retry_on .*", line)


def test_nothing_connects(command):
    broker = """
from dramatiq.brokers.redis import RedisBroker
broker = RedisBroker(url="redis://user:secret@127.0.0.1:1/0")
install(broker)
dramatiq.set_broker(broker)
"""
    result = command("check", command.app(PREPARED, broker=broker))
    assert result.exit_code == 0
    assert "secret" not in result.output


@pytest.mark.parametrize("of", ["RabbitmqBroker", "OurBroker"])
def test_a_timeout_beyond_rabbitmq_s_patience_is_found_there_only(command, of):
    broker = f"""
from dramatiq.brokers.rabbitmq import RabbitmqBroker
class OurBroker(RabbitmqBroker): pass
broker = {of}(url="amqp://guest:guest@127.0.0.1:1")
install(broker)
dramatiq.set_broker(broker)
"""
    long = job(timeout="3_600_000")
    patience = ("--worker-shutdown-timeout", "2h")
    assert codes(command.json("check", command.app(long, broker=broker), *patience, code=1)) == ["DP017"]
    assert codes(command.json("check", command.app(long, broker=broker), *patience, "--consumer-timeout", "2h")) == []
    assert codes(command.json("check", command.app(long), *patience)) == []


def test_live_lists_the_questions_that_a_server_can_not_answer(command):
    report = command.json("check", command.app(PREPARED), "--live")
    assert report["live"] == {"server": None, "unknown": ["a StubBroker has no server to check"]}
    shown = command("check", command.app(PREPARED), "--live").stdout
    assert "Read: no server.\nUnknown: a StubBroker has no server to check.\n" in shown


def test_live_needs_the_server(command):
    broker = """
from dramatiq.brokers.redis import RedisBroker
broker = RedisBroker(url="redis://user:secret@127.0.0.1:1/0")
install(broker)
dramatiq.set_broker(broker)
"""
    line = command.refuses("check", command.app(PREPARED, broker=broker), "--live")
    assert line.startswith("Error: Redis can't be reached at 127.0.0.1:1 (ConnectionError: ")
    assert "secret" not in line


def test_an_application_that_can_t_be_imported_is_one_sentence_without_secrets(command):
    app = command.app('raise RuntimeError("no answer from\\nredis://user:s3cr:t@db/0")\n')
    line = command.refuses("check", app)
    assert line.startswith(
        f"Error: '{app}' can't be imported: RuntimeError: no answer from redis://***@db/0 ({app}.py, line "
    )
    assert command.refuses("check", "no_such_app") == (
        "Error: 'no_such_app' can't be imported: ModuleNotFoundError: No module named 'no_such_app'"
    )
    assert "did you mean 'broker'" in command.refuses("check", f"{command.app('')}:brokre")
    assert "name the module" in command.refuses("check", "shop/app.py")
    assert "No such option" in command.refuses("check", app, "--lvie")


def test_the_broker_may_be_named_or_made_by_a_factory(command):
    source = PREPARED.replace("@dramatiq.actor(", "@dramatiq.actor(broker=mine, ")
    app = command.app(source, broker="mine = StubBroker()\ninstall(mine)\n")
    assert command.json("check", f"{app}:mine")["actors"] == 1
    factory = "def make():\n    broker = StubBroker()\n    install(broker)\n    dramatiq.set_broker(broker)\n"
    app = command.app(
        "print('a line of its own')\n" + "def jobs():\n    " + "\n    ".join(PREPARED.splitlines()) + "\n",
        broker=factory + "    jobs()\n",
    )
    assert command.json("check", f"{app}:make")["actors"] == 1


@pytest.mark.parametrize("form", ["human", "json", "github"])
def test_an_application_without_actors_is_never_ready_and_the_error_says_what_to_name(command, form):
    app = command.app("")
    line = command.refuses("check", app, "--format", form)
    assert line.startswith(f"Error: {app} declares no actors. Name the module that imports your actors")
    assert "--django" in line


def test_a_module_of_jobs_alone_is_checked_with_a_broker_that_stands_in(command):
    app = command.app(PREPARED, broker="")
    assert codes(command.json("check", app)) == []
    assert (
        command("check", app).stderr == "The application sets no broker: the actors were declared on a placeholder.\n"
    )


def test_modules_are_looked_for_in_the_path(command):
    app = command.app(PREPARED)
    (command.folder / "src").mkdir()
    (command.folder / f"{app}.py").rename(command.folder / "src" / f"{app}.py")
    assert command("check", app).exit_code == 2
    assert command("check", app, "--path", "src").exit_code == 0


def test_a_unit_test_can_check_a_single_actor(command):
    app = command.app(PREPARED + "\n@dramatiq.actor\ndef charge(): pass\n")
    assert_job_ready(find_actor(f"{app}:send_mail"))
    with pytest.raises(AssertionError, match=r"The job charge is not ready:\n  DP001 "):
        assert_job_ready(find_actor(f"{app}:charge"))
    with pytest.raises(AssertionError, match="DP008"):
        assert_job_ready(find_actor(f"{app}:send_mail"), required_tags=("criticality",))


def test_the_json_report_has_the_documented_fields(command):
    report = json.loads(command("check", command.app(PREPARED), "--format", "json").stdout)
    assert set(report) == {"ok", "actors", "findings", "exempt", "baseline", "fixed"}
    assert set(report["exempt"][0]) == {"code", "severity", "actor", "message", "fix", "file", "line", "exempt"}


def test_each_code_is_documented():
    page = (ROOT / "docs" / "checks.md").read_text()
    assert re.findall(r"^\| (DP\d+) \|", page, re.MULTILINE) == list(CODES)


def test_settings_that_can_not_be_read_are_one_sentence(command):
    app = command.app(PREPARED)
    (command.folder / "old.json").write_text('{"findings": [{"code": "DP001"}]}')
    assert "The baseline old.json can't be read" in command.refuses("check", app, "--baseline", "old.json")
    (command.folder / "pyproject.toml").write_text("[tool.dramatiq_policies")
    assert "pyproject.toml can't be read" in command.refuses("check", app)


def test_an_actor_that_was_declared_before_install_is_found_out(command):
    late = "import dramatiq\nfrom dramatiq.brokers.stub import StubBroker\n"
    late += (
        "broker = StubBroker()\n\n@dramatiq.actor(broker=broker)\ndef charge(): pass\n\ndramatiq.set_broker(broker)\n"
    )
    (command.folder / "app_bare.py").write_text(late)
    (actor,) = load_broker("app_bare").actors.values()
    assert [finding.code for finding in check_actor(actor)] == ["DP022"]


def test_a_queue_without_a_threshold_is_found_beside_one_that_has_one(command):
    watched = """
from dramatiq_policies import QueueMonitor, Threshold
broker = StubBroker()
install(broker, queue_monitor=QueueMonitor(thresholds={"mail": Threshold(ready=5)}))
dramatiq.set_broker(broker)
"""
    report = command.json("check", command.app(PREPARED, broker=watched))
    assert [finding for finding in report["findings"] if finding["code"] == "DP019"] == []
    report = command.json("check", command.app(PREPARED.replace('"mail"', '"post"'), broker=watched))
    assert [finding["message"] for finding in report["findings"] if finding["code"] == "DP019"] == [
        "The queue 'post' has no threshold"
    ]


def test_where_unclassified_decides_there_is_a_cap(command):
    capped = (
        "broker = StubBroker()\nrules = ErrorClassifier(unclassified=RetryPolicy(attempts=2), max_retries=None)\n"
        "install(broker, error_classifier=rules)\ndramatiq.set_broker(broker)\n"
    )
    uncapped = capped.replace("unclassified=RetryPolicy(attempts=2), ", "")
    assert codes(command.json("check", command.app(PREPARED, broker=capped))) == []
    assert codes(command.json("check", command.app(PREPARED, broker=uncapped), code=1)) == ["DP003"]


def test_a_name_that_is_no_broker_and_makes_none_is_refused(command):
    assert "is neither a broker nor a callable" in command.refuses("check", f"{command.app('ANSWER = 42')}:ANSWER")


def test_an_actor_whose_name_means_something_else_in_its_module_is_found_on_the_broker(command):
    app = command.app(PREPARED + "\nsend_mail = None\n")
    assert find_actor(f"{app}:send_mail").actor_name == "send_mail"


def found(report, code):
    return [finding for finding in report["findings"] if finding["code"] == code]


def test_retries_that_go_on_for_more_than_a_day_are_reported(command):
    (finding,) = found(command.json("check", command.app(job())), "DP026")
    assert finding["message"].startswith("After an error without a rule the job runs up to 21 times, over up to 46 d")
    assert found(command.json("check", command.app(job(), broker=BOUNDED)), "DP026") == []
    slow = job(retry_on="{OSError: RetryPolicy(attempts=9, wait=constant(12_000_000))}")
    (finding,) = found(command.json("check", command.app(slow, broker=BOUNDED)), "DP026")
    assert finding["message"] == "The rule for OSError gives up after up to 26 h 40 m"


STEPS = """
def step(name, **options):
    def work(*args):
        "Does something."
    return dramatiq.actor(actor_name=name, queue_name="q", retry_on=(), discard_on=(), timeout=5_000, **options)(work)
a = step("a", idempotency_key="a:{args}")
b = step("b", idempotent=True)
c = step("c", idempotency_key="c:{args}")
"""


@pytest.mark.parametrize(
    ("sends", "unkeyed"),
    [
        ("def send(): (a.message(1) | b.message() | c.message()).run()", ["b"]),
        ("def send(): dramatiq.pipeline([a.message(1), b.message_with_options(args=())]).run()", ["b"]),
        ("def send():\n    steps = [a.message(1), b.message()]\n    dramatiq.pipeline(steps).run()", ["b"]),
        ("def send(): (a.message(1) | c.message()).run()", []),
        ("def send(): (b.message(1) | c.message()).run()", []),
        ("def send(): return 1 | 2", []),
    ],
)
def test_a_pipeline_whose_first_job_alone_has_a_key_is_found(command, sends, unkeyed):
    source = STEPS.replace(":{args}", ":{day}").replace("*args", "day=None")
    report = command.json("check", command.app(f"{source}\n{sends}\n"), "--ignore", "DP006", "--reason", "x")
    assert [finding["actor"] for finding in found(report, "DP030")] == unkeyed


def test_a_group_s_callback_and_a_result_without_their_middleware_are_found(command):
    uses = """
def images():
    g = dramatiq.group([send_mail.message(1)])
    g.add_completion_callback(send_mail.message(2))
    g.run()
    return g.get_results(), send_mail.send(1).get_result()
"""
    report = command.json("check", command.app(job() + uses), code=1)
    assert codes(report) == ["DP028", "DP029", "DP029"]
    complete = """
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import StubBackend
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend as StubResults
broker = StubBroker()
broker.add_middleware(GroupCallbacks(StubBackend()))
broker.add_middleware(Results(backend=StubResults()))
install(broker)
dramatiq.set_broker(broker)
"""
    assert codes(command.json("check", command.app(job() + uses, broker=complete))) == []


def test_a_get_result_of_something_else_is_no_finding(command):
    uses = "\ndef other(client):\n    job = client.query('select 1')\n    return job.get_result()\n"
    assert codes(command.json("check", command.app(job() + uses))) == []


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"timeout": "30"}, "timeout=30"),
        ({"queue_timeout": "3600"}, "queue_timeout=3600"),
        ({"max_age": "3600"}, "max_age=3600"),
        ({"max_backoff": "600"}, "max_backoff=600"),
        ({"retry_on": "{OSError: RetryPolicy(attempts=3, wait=exponential(initial=2, maximum=60_000))}"}, "initial=2"),
        ({"retry_on": "{OSError: RetryPolicy(attempts=3, wait=constant(1_000), max_elapsed=60)}"}, "max_elapsed=60"),
    ],
)
def test_a_duration_that_looks_like_seconds_is_found(command, changed, option):
    (finding,) = found(command.json("check", command.app(job(**changed), broker=BOUNDED)), "DP027")
    assert finding["message"].startswith(f"{option} is ")
    assert (finding["actor"], finding["severity"]) == ("send_mail", "warning")


@pytest.mark.parametrize(
    ("argument", "option"),
    [
        ("timeout=Timeout(default=30)", "default=30"),
        ("queue_monitor=QueueMonitor(interval=15)", "interval=15"),
        ("queue_monitor=QueueMonitor(thresholds={'mail': Threshold(oldest=300)})", "oldest=300"),
        ("queue_monitor=QueueMonitor(thresholds={'*': Threshold(stalled=3600)})", "stalled=3600"),
        ("timeout=Timeout(grace=5)", "grace=5"),
        ("timeout=Timeout(queue_default=600)", "queue_default=600"),
        ("heartbeat=Heartbeat(interval=10)", "interval=10"),
        ("idempotency=Idempotency(lease=60)", "lease=60"),
    ],
)
def test_a_broker_s_duration_that_looks_like_seconds_is_found(command, argument, option):
    broker = BOUNDED.replace("install(broker,", f"install(broker, {argument},")
    (finding,) = found(command.json("check", command.app(job(), broker=broker)), "DP027")
    assert finding["message"].startswith(f"{option} is ")
    assert finding["actor"] is None


def test_a_short_timedelta_is_taken_as_written(command):
    for number in (20, 2_000):  # As plain numbers these look like seconds.
        constant(number)
        Timeout(queue_default=number)
    rule = "RetryPolicy(attempts=3, wait=constant(ms(20)), max_elapsed=ms(2_000))"
    installed = (
        "timeout=Timeout(default=ms(20), grace=ms(20)), "
        "queue_monitor=QueueMonitor(interval=ms(20), thresholds={'mail': Threshold(oldest=ms(2_000))})"
    )
    broker = "from datetime import timedelta\n\ndef ms(n): return timedelta(milliseconds=n)\n\n" + BOUNDED.replace(
        "install(broker,", f"install(broker, {installed},"
    )
    short = dict.fromkeys(["timeout", "queue_timeout", "max_age", "min_backoff", "max_backoff"], "ms(20)")
    app = command.app(job(retry_on=f"{{OSError: {rule}}}", **short), broker=broker)
    assert found(command.json("check", app), "DP027") == []
