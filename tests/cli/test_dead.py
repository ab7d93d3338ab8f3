"""`dramatiq-policies dead`, on a StubBroker whose dead letters the application brings along."""

from __future__ import annotations

import json
import re
import sys

import pytest
from dramatiq import Message
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from rich.console import Console

from dramatiq_policies import ops
from dramatiq_policies._dramatiq import StubMessage
from dramatiq_policies.brokers.stub.browser import StubBrowser
from dramatiq_policies.cli.dead import no_dead_letters
from dramatiq_policies.common.clock import now_ms

APP = """
import time
from dramatiq_policies._dramatiq import StubMessage

@dramatiq.actor(queue_name="mail", tags={"team": "shop"})
def send_mail(order_id, address=None): "Tells the customer."

@dramatiq.actor(queue_name="import")
def import_batch(first): "Writes."

def bury(actor, id, exception="app.MailDown", text="no answer", outcome="dead", reason="exhausted", ago=0, args=(7,), **options):
    now = int(time.time() * 1000)
    failure = dict(outcome=outcome, reason=reason, exception=exception, message=text, traceback="Traceback …\\n" + text,
                   attempts=3, failed_at=now - ago, history=[
                       dict(attempt=1, exception=exception, message=text, failed_at=now - ago - 5, delay_ms=5)])
    options = {"failure": failure, "retries": 2, "traceback": "t", "requeue_timestamp": 1, "eta": 1, "redis_message_id": "r",
               "ready_at": 1, "policies": {"total": 3, "runs": {}, "history": []}, "broker_priority": 3, **options}
    message = dramatiq.Message(actor.queue_name, actor.actor_name, args, {"address": "ada@example.com"}, options, id, now - ago)
    broker.dead_letters_by_queue[actor.queue_name].append(StubMessage(message))

bury(send_mail, "m1", ago=7_200_000)
bury(send_mail, "m2", ago=60_000, text="at amqp://user:secret@host/")
bury(send_mail, "m3", exception="app.NoKey", outcome="alerted", reason=None)
bury(import_batch, "i1", exception="builtins.ValueError", text="row 7", outcome="discarded", reason=None)
"""


@pytest.fixture
def app(command):
    return command.app(APP)


@pytest.fixture
def broker(command, app):
    return ops.load_broker(app)


def ids(command, app, *options):
    return [letter["message_id"] for letter in command.json("dead", "list", app, *options)]


def queued(broker, queue="mail"):
    return [Message.decode(body) for body in list(broker.queues[queue].queue)]


def dead(broker):
    return [letter.message_id for letters in broker.dead_letters_by_queue.values() for letter in letters]


def test_the_summary_counts_by_actor_exception_and_outcome_the_most_frequent_first(command, app):
    groups = command.json("dead", "summary", app)
    assert [(g["count"], g["actor"], g["exception"], g["outcome"]) for g in groups] == [
        (2, "send_mail", "app.MailDown", "dead"),
        (1, "import_batch", "builtins.ValueError", "discarded"),
        (1, "send_mail", "app.NoKey", "alerted"),
    ]
    assert groups[0]["last_seen"] - groups[0]["first_seen"] == pytest.approx(7_140_000, abs=1_000)
    shown = command("dead", "summary", app).stdout.splitlines()
    assert re.split(r" {2,}", shown[1].strip())[:4] == ["2", "send_mail", "app.MailDown", "dead (exhausted)"]


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ((), ["i1", "m1", "m2", "m3"]),
        (("--queue", "mail"), ["m1", "m2", "m3"]),
        (("--queue", "mail", "--queue", "import", "--limit", "2"), ["m1", "m2"]),
        (("--actor", "import_batch"), ["i1"]),
        (("--error", "NoKey"), ["m3"]),
        (("--error", "ROW 7"), ["i1"]),
        (("--outcome", "alerted"), ["m3"]),
        (("--reason", "exhausted"), ["m1", "m2"]),
        (("--tag", "team=shop"), ["m1", "m2", "m3"]),
        (("--older-than", "1h"), ["m1"]),
        (("--newer-than", "30s"), ["i1", "m3"]),
        (("--id", "m2", "--id", "i1"), ["i1", "m2"]),
        (("--where", "order_id=8"), ["m5"]),
        (("--where", "0=8"), ["m5"]),
        (("--where", "address=ada@example.com", "--where", "order_id=7"), ["m1", "m2", "m3"]),
    ],
)
def test_a_filter_selects_dead_letters(command, app, options, meant):
    if "--where" in options:
        app = command.app(APP + 'bury(send_mail, "m5", args=(8,))\n')
        options = (*options, "--actor", "send_mail")
    assert ids(command, app, *options, "--oldest") == meant


def test_a_list_has_the_newest_first_unless_the_oldest_are_asked_for(command, app):
    assert ids(command, app) == ["i1", "m3", "m2", "m1"]
    assert ids(command, app, "--limit", "2") == ["i1", "m3"]
    assert ids(command, app, "--oldest") == ["i1", "m1", "m2", "m3"]
    assert ids(command, app, "--queue", "mail", "--limit", "2", "--oldest") == ["m1", "m2"]


NOTHING = [
    (("--error", "MialDown"), "Nothing matches --error MialDown: 0 of 4 dead letters; did you mean 'MailDown'"),
    (("--actor", "send_mial"), "Nothing matches --actor send_mial: 0 of 4 dead letters; did you mean 'send_mail'?"),
    (("--actor", "nosuch"), "Nothing matches --actor nosuch: 0 of 4 dead letters."),
    (("--reason", "exausted"), "Nothing matches --reason exausted: 0 of 4 dead letters; did you mean 'exhausted'?"),
    (("--tag", "team=shp"), "Nothing matches --tag team=shp: 0 of 4 dead letters; did you mean 'team=shop'?"),
    (("--where", "order_id=9"), "Nothing matches --where order_id=9: 0 of 4 dead letters."),
    (("--queue", "mail", "--actor", "import_batch"), "Nothing matches --actor import_batch: 0 of 3 dead letters."),
]


@pytest.mark.parametrize(("options", "sentence"), NOTHING)
@pytest.mark.parametrize("form", ["human", "json"])
@pytest.mark.parametrize("act", [("summary",), ("list",), ("replay", "--yes"), ("purge", "--dry-run")], ids=" ".join)
def test_a_filter_that_matches_nothing_is_answered_with_the_nearest_name(command, app, act, form, options, sentence):
    result = command("dead", act[0], app, *act[1:], *options, "--format", form)
    assert result.exit_code == 1
    assert result.stderr.startswith(sentence)
    if form == "json":
        assert json.loads(result.stdout) in ([], {"count": 0, "unreadable": 0, "dry_run": "--dry-run" in act})


def test_the_beginning_of_an_id_is_enough_where_no_other_has_it(command):
    app = command.app(APP + 'bury(send_mail, "abc-1")\nbury(send_mail, "abc-2")\nbury(send_mail, "abd")\n')
    assert command.json("dead", "show", app, "abd")["message_id"] == "abd"
    assert command.json("dead", "show", app, "i")["message_id"] == "i1"
    assert ids(command, app, "--id", "abd") == ["abd"]
    assert command.json("dead", "replay", app, "--id", "abc-1", "--dry-run")["count"] == 1
    for given in (("show", app, "ab"), ("purge", app, "--id", "ab", "--yes"), ("list", app, "--id", "ab")):
        assert "3 dead letters begin with 'ab' (abc-1, abc-2, abd); write more characters." in command.refuses(
            "dead", *given
        )
    assert len(ids(command, app)) == 7


def test_dead_letters_of_a_queue_no_longer_declared_are_found(command):
    app = command.app(
        APP + "gone = dramatiq.Message('old', 'gone', (), {}, {}, 'g1')\n"
        "broker.dead_letters_by_queue['old'].append(StubMessage(gone))\n"
    )
    assert [group["actor"] for group in command.json("dead", "summary", app) if group["actor"] == "gone"] == ["gone"]
    assert ids(command, app, "-q", "old") == ["g1"]
    assert "name a target queue with --to-queue" in command.refuses("dead", "replay", app, "-q", "old", "--yes")
    assert command.json("dead", "replay", app, "--yes")["count"] == 4
    assert command.json("dead", "replay", app, "-q", "old", "--to-queue", "mail", "--dry-run")["count"] == 1
    assert command.json("dead", "purge", app, "-q", "old", "--yes")["count"] == 1


def test_a_list_is_one_line_each_and_holds_no_arguments_or_passwords(command, app):
    shown = command("dead", "list", app).stdout
    assert len(shown.splitlines()) == 4
    assert "MailDown: at amqp://***@host/" in shown
    assert "ada@example.com" not in shown
    assert "secret" not in shown


def test_a_json_list_has_one_element_a_line(command, app):
    lines = command("dead", "list", app, "--format", "json").stdout.splitlines()
    assert lines[0] == "["
    assert json.loads(lines[1].rstrip(","))["message_id"] == "i1"
    assert command.json("dead", "list", app, "--id", "nobody", code=1) == []


def test_show_prints_a_dead_letter_without_its_arguments(command, app):
    shown = command("dead", "show", app, "m1").stdout
    assert "app.MailDown" in shown
    assert "Traceback …\nno answer" in shown
    assert "ada@example.com" not in shown
    assert command.json("dead", "show", app, "m1")["kwargs"] == {"address": "<str>"}
    whole = command.json("dead", "show", app, "m1", "--args")
    assert (whole["args"], whole["kwargs"]) == ([7], {"address": "ada@example.com"})
    assert whole["options"] == {"broker_priority": 3}
    assert whole["history"][0]["delay_ms"] == 5
    assert "no dead letter with the id 'm9'" in command.refuses("dead", "show", app, "m9")


def test_a_replay_is_the_message_without_its_past_and_counts_itself(command, app, broker):
    before = now_ms()
    result = command("dead", "replay", app, "--id", "m1", "--yes")
    assert result.stdout == "1 dead letter replayed.\n"
    (message,) = queued(broker)
    assert message.message_id == "m1"
    assert (message.args, message.kwargs) == ((7,), {"address": "ada@example.com"})
    assert message.message_timestamp >= before
    assert message.options.pop("ready_at") >= before
    assert message.options == {"broker_priority": 3, "policies": {"replays": 1}}
    assert dead(broker) == ["m2", "m3", "i1"]


def test_a_second_replay_counts_on(command, app, broker):
    letter = broker.dead_letters_by_queue["mail"][0]
    letter.options["policies"]["replays"] = 4
    command("dead", "replay", app, "--id", "m1", "--yes")
    assert queued(broker)[0].options["policies"] == {"replays": 5}


def test_a_replay_may_get_a_new_id_and_another_queue(command, app, broker):
    command("dead", "replay", app, "--id", "m1", "--yes", "--new-id", "--to-queue", "import")
    (message,) = queued(broker, "import")
    assert message.message_id != "m1"
    assert message.queue_name == "import"


def test_the_json_of_a_command_that_acts_has_its_counts(command, app):
    assert command.json("dead", "replay", app, "--dry-run") == {"count": 4, "dry_run": True, "unreadable": 0}
    assert command.json("dead", "replay", app, "--id", "m1", "--yes") == {"count": 1, "dry_run": False, "unreadable": 0}
    assert command.json("dead", "purge", app, "--dry-run") == {"count": 3, "dry_run": True, "unreadable": 0}
    assert command.json("dead", "purge", app, "--yes") == {"count": 3, "dry_run": False, "unreadable": 0}
    assert command.json("queues", "move", app, "mail", "--to", "import", "--dry-run") == {
        "count": 1,
        "unreadable": 0,
        "dry_run": True,
    }
    assert command.json("queues", "move", app, "mail", "--to", "import", "--yes") == {
        "count": 1,
        "unreadable": 0,
        "dry_run": False,
    }


def test_a_dry_run_changes_nothing(command, app, broker):
    assert (
        command("dead", "replay", app, "--queue", "mail", "--dry-run").stdout == "3 dead letters would be replayed.\n"
    )
    assert command("dead", "purge", app, "--queue", "mail", "--dry-run").stdout == "3 dead letters would be deleted.\n"
    assert len(dead(broker)) == 4


def test_a_replay_asks_for_confirmation(command, app, broker):
    no = command("dead", "replay", app, answers="n\n")
    assert (no.exit_code, no.stdout) == (1, "")
    assert "Replay 4 dead letters (3 of send_mail in mail, 1 of import_batch in import)?" in no.stderr
    silent = command("dead", "purge", app)
    assert silent.exit_code == 2
    assert silent.stderr.endswith("Error: Nothing was done: no confirmation. Answer yes, or pass --yes.\n")
    assert len(dead(broker)) == 4
    assert command("dead", "replay", app, answers="y\n").stdout == "4 dead letters replayed.\n"
    assert dead(broker) == []


def test_a_limit_bounds_it(command, app, broker):
    command("dead", "replay", app, "--limit", "2", "--yes")
    assert len(dead(broker)) == 2


def test_a_rate_bounds_it(command, app, monkeypatch):
    waits = []
    monkeypatch.setattr("dramatiq_policies.brokers.stub.browser.time.sleep", waits.append)
    command("dead", "replay", app, "--queue", "mail", "--rate", "0.5", "--yes")
    # Against a clock on which the waits take no time.
    assert waits == pytest.approx([2, 4, 6], abs=0.5)


def test_a_purge_deletes_the_selected_dead_letters(command, app, broker):
    assert (
        command("dead", "purge", app, "--queue", "mail", "--outcome", "dead", "--yes").stdout
        == "2 dead letters deleted.\n"
    )
    assert dead(broker) == ["m3", "i1"]
    assert queued(broker) == []


def test_an_interrupted_replay_says_how_far_it_came(command, app, broker, monkeypatch):
    sent = []

    def enqueue(message, delay=None):
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(message)

    monkeypatch.setattr(broker, "enqueue", enqueue)
    result = command("dead", "replay", app, "--yes")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted: 2 dead letters replayed; the rest is unchanged.\n"
    assert len(dead(broker)) == 2


def test_an_unreadable_dead_letter_is_shown_as_such_and_stays(command, app, broker):
    raw = broker.dead_letters_by_queue["mail"][0]
    raw.encode = lambda: b"{no json"
    assert command.json("dead", "list", app, "--reason", "malformed")[0]["text"] == "{no json"
    result = command("dead", "replay", app, "--reason", "malformed", "--yes")
    assert result.stderr == "1 message can't be read and remains in the queue.\n"
    assert len(dead(broker)) == 4


def garble(broker, *places):
    """Have dead letters of the queue ``mail`` be bodies that can't be read."""
    for place in places:
        broker.dead_letters_by_queue["mail"][place].encode = lambda: b"{no json"


@pytest.mark.parametrize("options", [(), ("--limit", "2"), ("--queue", "mail")])
def test_a_dry_run_counts_the_dead_letters_that_the_real_run_then_replays(command, app, broker, options):
    garble(broker, 0, 1)
    told = command.json("dead", "replay", app, *options, "--dry-run")
    assert told == {**command.json("dead", "replay", app, *options, "--yes"), "dry_run": True}
    assert told["unreadable"] > 0
    assert told["count"] > 0


def test_a_dry_run_says_how_many_can_t_be_read(command, app, broker):
    garble(broker, 0, 1)
    told = command("dead", "replay", app, "--dry-run")
    assert told.stdout == "2 dead letters would be replayed.\n"
    assert told.stderr == "2 messages can't be read and remain in the queue.\n"
    assert len(dead(broker)) == 4


def test_an_unreadable_dead_letter_is_not_replayed_but_can_be_purged(command, app, broker):
    garble(broker, 0, 1, 2)
    result = command("dead", "replay", app, "--queue", "mail")
    assert (result.exit_code, result.stdout) == (0, "0 dead letters replayed.\n")
    assert result.stderr == "3 messages can't be read and remain in the queue.\n"
    assert "Replay 1 dead letter (1 of import_batch in import)?" in command("dead", "replay", app, answers="n\n").stderr
    assert command.json("dead", "purge", app, "--queue", "mail", "--dry-run")["count"] == 3
    assert command("dead", "purge", app, "--queue", "mail", "--yes").stdout == "3 dead letters deleted.\n"


def test_a_stock_dead_letter_shows_the_error_of_its_traceback(command, app, broker):
    letter = broker.dead_letters_by_queue["mail"][0]
    del letter.options["failure"]
    letter.options["traceback"] = 'Traceback (most recent call last):\n  File "x"\napp.MailDown: no answer\n'
    shown = command.json("dead", "show", app, "m1")
    assert (shown["outcome"], shown["exception"], shown["text"]) == ("dead", "app.MailDown", "no answer")
    assert shown["attempts"] == 3


def test_a_wrong_name_is_one_sentence_that_helps(command, app):
    assert "did you mean 'mail'" in command.refuses("dead", "list", app, "--queue", "mial")
    assert "write NAME=VALUE" in command.refuses("dead", "list", app, "--tag", "team")
    assert "is not a duration" in command.refuses("dead", "list", app, "--older-than", "soon")
    assert "did you mean 'mail'" in command.refuses("dead", "replay", app, "--yes", "--to-queue", "mails")


@pytest.mark.parametrize(
    ("condition", "nearest"),
    [
        (("--where", "ordr_id=7"), "'order_id'"),
        (("--where", "ordr_id=7", "--actor", "send_mail"), "'order_id'"),
        (("--where", "adress=ada@example.com"), "'address'"),
        (("--where", "order.idd=7"), "'order.id'"),
        (("--tag", "taem=shop"), "'team'"),
        (("--tag", "team=shup"), "'team=shop'"),
        (("--reason", "exhaustd"), "'exhausted'"),
        (("--error", "MailDwn"), "'MailDown'"),
        (("--actor", "send_mial"), "'send_mail'"),
    ],
)
@pytest.mark.parametrize("what", [("list",), ("summary",), ("replay", "--yes"), ("purge", "--yes")], ids=lambda w: w[0])
def test_a_misspelt_name_in_a_filter_gets_the_nearest_name(command, app, broker, condition, nearest, what):
    sent = Message("mail", "send_mail", (), {"order": {"id": 7}}, {}, "m5", now_ms())
    broker.dead_letters_by_queue["mail"].append(StubMessage(sent))
    shown = command("dead", *what, app, *condition)
    assert (shown.exit_code, f"did you mean {nearest}" in shown.stderr) == (1, True), shown.output


@pytest.mark.parametrize("condition", [("--where", "order_id=9"), ("--where", "0=9"), ("--where", "zzzzz=9")])
def test_a_name_that_is_known_or_like_none_gets_no_suggestion(command, app, condition):
    assert "did you mean" not in command("dead", "list", app, *condition).stderr


def test_without_dead_letters_a_name_is_compared_with_the_declared_names(command):
    app = command.app(APP.partition("bury(send_mail")[0])
    assert (
        "0 of 0 dead letters; did you mean 'order_id'?" in command("dead", "list", app, "--where", "ordr_id=9").stderr
    )
    assert command("dead", "list", app, "--where", "order_id=9").stderr == "No dead letters.\n"


@pytest.mark.parametrize(
    ("given", "warned"), [("60", True), ("60s", False), ("60ms", False), ("60000", False), ("0", False)]
)
def test_a_time_without_a_unit_that_looks_like_seconds_is_a_warning(command, app, given, warned):
    said = command("dead", "list", app, "--older-than", given).stderr
    assert ("--older-than 60 is 60 milliseconds. For seconds write 60s." in said) is warned


def test_without_a_queue_rabbitmq_s_answer_is_about_the_declared_queues(broker):
    rabbitmq = RabbitmqBroker(url="amqp://localhost")
    assert no_dead_letters(rabbitmq, ()) == "No dead letters on the declared queues."
    assert no_dead_letters(rabbitmq, ["mail"]) == no_dead_letters(broker, ()) == "No dead letters."


def test_a_broker_that_stores_messages_in_its_own_way_is_refused(command):
    broker = """
class Other(dramatiq.Broker):
    def declare_queue(self, queue): self.queues[queue] = None
    def get_declared_queues(self): return set(self.queues)
broker = install(Other())
dramatiq.set_broker(broker)
"""
    app = command.app('@dramatiq.actor(queue_name="mail")\ndef send_mail(): pass\n', broker=broker)
    assert "Other is an unknown broker type" in command.refuses("dead", "list", app)


def test_a_moved_message_is_the_same_in_another_queue(command, app, broker):
    sent = [broker.actors["send_mail"].send(number) for number in range(3)]
    other = broker.actors["send_mail"].message(9)
    other = other.copy(actor_name="import_batch")
    broker.enqueue(other)
    moved = ops.move(broker, "mail", "import", actor="send_mail")
    assert moved.count == 3
    assert [m.message_id for m in queued(broker, "import")] == [m.message_id for m in sent]
    assert {m.queue_name for m in queued(broker, "import")} == {"import"}
    assert [m.message_id for m in queued(broker, "mail")] == [other.message_id]
    assert broker.queues["mail"].unfinished_tasks == 1


def test_where_nothing_is_dead_it_says_so(command, app):
    app = command.app("@dramatiq.actor\ndef send_mail(): pass\n")
    assert command("dead", "summary", app).stdout == "No dead letters.\n"
    listed = command("dead", "list", app, "--reason", "exhausted")
    assert (listed.exit_code, listed.stdout, listed.stderr) == (0, "", "No dead letters.\n")


def test_an_undeclared_actor_is_reported_even_without_any_dead_letter(command):
    app = command.app("@dramatiq.actor\ndef send_mail(): pass\n")
    for name in ("summary", "list"):
        result = command("dead", name, app, "--actor", "send_mial")
        assert (result.exit_code, "did you mean 'send_mail'?" in result.stderr) == (1, True)


@pytest.mark.parametrize("failed_at", [10**18, -(10**18), 1e300])
def test_a_time_that_no_calendar_has_does_not_keep_the_others_from_being_shown(command, failed_at):
    strange = APP + f'failure = {{"outcome": "dead", "failed_at": {failed_at}, "history": [{{"failed_at": "?"}}]}}\n'
    app = command.app(strange + 'bury(send_mail, "m4", failure=failure)\n')
    for given in (("summary", app), ("list", app), ("show", app, "m4")):
        result = command("dead", *given)
        assert result.exit_code == 0, result.output
    listed = command("dead", "list", app).stdout.splitlines()
    assert len(listed) == 5
    assert any(line.startswith("-  m4") for line in listed)


def test_a_terminal_gets_lines_of_its_width(command, app, monkeypatch):
    def narrow():
        return Console(file=sys.stdout, width=24, force_terminal=True, color_system=None)

    monkeypatch.setattr(sys.modules["dramatiq_policies.cli.dead"], "console", narrow)
    lines = command("dead", "list", app, "--actor", "import_batch").stdout.splitlines()
    assert all(len(line) <= 24 for line in lines)
    assert " ".join(" ".join(lines).split()[2:]) == "i1 import import_batch discarded ValueError: row 7"


def test_on_80_columns_nothing_is_cut_ids_are_short_and_no_name_is_broken(command, monkeypatch):
    def terminal():
        return Console(file=sys.stdout, width=80, force_terminal=True, color_system=None)

    id_ = "3f2a9c1e-0000-4000-8000-000000000000"
    app = command.app(
        APP + f"bury(send_mail, '{id_}', exception='shop.gateway.PaymentGatewayUnreachable', text='no answer ' * 12)\n"
    )
    for module in ("dead", "output"):
        monkeypatch.setattr(sys.modules[f"dramatiq_policies.cli.{module}"], "console", terminal)
    listed = command("dead", "list", app).stdout
    assert id_ not in listed
    assert all(len(line) <= 80 for line in listed.splitlines())
    assert "3f2a9c1e  mail  send_mail" in listed
    assert "PaymentGatewayUnreachable: no answer" in listed
    assert listed.count("no answer") == 12 + 2
    summary = command("dead", "summary", app).stdout
    assert "shop.gateway.PaymentGatewayUnreachable" in summary
    assert command.json("dead", "show", app, "3f2a9c1e")["message_id"] == id_


def test_a_dead_letter_without_a_history_is_shown_without_one(command, app, broker):
    failure = broker.dead_letters_by_queue["import"][0].options["failure"]
    failure["history"], failure["failed_at"] = [], None
    shown = command("dead", "show", app, "i1").stdout
    assert "row 7" in shown
    assert "again after" not in shown
    assert "again after" in command("dead", "show", app, "m1").stdout


def test_a_group_of_dead_letters_without_times_has_none(command, app, broker):
    broker.dead_letters_by_queue["import"][0].options["failure"]["failed_at"] = None
    (group,) = command.json("dead", "summary", app, "--actor", "import_batch")
    assert (group["count"], group["first_seen"], group["last_seen"]) == (1, None, None)


def test_an_actor_that_is_misspelt_is_no_reason_to_ask(command, app, broker):
    result = command("dead", "replay", app, "--actor", "send_mial")
    assert (result.exit_code, result.stdout) == (1, "0 dead letters replayed.\n")
    assert "did you mean 'send_mail'" in result.stderr
    assert len(dead(broker)) == 4


def test_a_dead_letter_taken_by_another_process_meanwhile_is_not_counted(app, broker, monkeypatch):
    stock = StubBrowser.drop
    monkeypatch.setattr(
        StubBrowser, "drop", lambda browser, item: stock(browser, item) and item.place.message_id != "m2"
    )
    moved = ops.purge(broker, where=ops.Filter(actor="send_mail"))
    assert (moved.seen, moved.count) == (4, 2)


def test_a_replay_reports_its_progress_to_a_callback(app, broker):
    told = []
    moved = ops.replay(broker, where=ops.Filter(actor="send_mail"), progress=lambda *far: told.append(far))
    assert (moved.seen, moved.count) == (4, 3)
    assert [seen for seen, _ in told] == [1, 2, 3, 4]
    assert [total for _, total in told] == [1, 3, 3, 3]
