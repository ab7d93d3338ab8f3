"""``dramatiq-policies outbox``: list, retry and purge on SQLite; its row in ``queues``; its findings in ``check``."""

from __future__ import annotations

import re
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from dramatiq_policies import ops
from dramatiq_policies.sql import SqlOutbox, create_tables
from dramatiq_policies.transactions.database import OUTBOX
from dramatiq_policies.transactions.outbox_table import MESSAGE, NewRow

ROOT = Path(__file__).parents[2]


def monitored(outbox=""):
    return f"queue_monitor=QueueMonitor(thresholds={{'*': Threshold(ready=9)}}, {outbox})"


class Shop:
    """An application with an outbox in a file, and its rows."""

    def __init__(self, command, folder):
        self.command = command
        self.url = f"sqlite:///{folder / 'shop.db'}"
        self.file = folder / "shop.db"
        self.engine = sa.create_engine(self.url)
        self.outbox = SqlOutbox(self.engine)
        create_tables(self.engine)
        self.app = self.declare()

    def declare(self, more=""):
        broker = f"""
import sqlalchemy
from dramatiq_policies.sql import SqlOutbox
broker = StubBroker()
install(broker, outbox=SqlOutbox(sqlalchemy.create_engine({self.url!r})), {more})
dramatiq.set_broker(broker)
"""
        jobs = """
        @dramatiq.actor(queue_name="mail")
        def send_mail(number):
            pass

        @dramatiq.actor(queue_name="import")
        def load(number):
            pass
        """
        return self.command.app(jobs, broker=broker)

    def row(self, message_id, actor="send_mail", queue="mail", *, failures=0, owner="", age=0):
        row = NewRow(MESSAGE, message_id, actor, queue, b"body")
        table = self.outbox.table
        self.outbox.database.run(lambda connection: table.insert(connection, row, owner or "nobody", due=not owner))
        if failures or age:
            with closing(sqlite3.connect(self.file)) as connection, connection:
                connection.execute(
                    f"UPDATE {OUTBOX} SET failures = ?, error = ?, owner = '', due_at = due_at + 60000,"
                    " created_at = created_at - ? WHERE message_id = ?",
                    (failures, "no\nbroker" if failures else "", age, message_id),
                )

    def ids(self):
        with closing(sqlite3.connect(self.file)) as connection, connection:
            return [one for (one,) in connection.execute(f"SELECT message_id FROM {OUTBOX} ORDER BY id")]


@pytest.fixture
def shop(command, tmp_path):
    shop = Shop(command, tmp_path)
    yield shop
    shop.outbox.database.close()
    shop.engine.dispose()


def test_the_oldest_message_of_the_outbox_is_listed_first_with_its_error(command, shop):
    shop.row("a1111111-x")
    shop.row("b2222222-x", failures=4, age=120_000)
    result = command("outbox", "list", shop.app)
    assert result.exit_code == 0, result.output
    head, first, second = (line.split() for line in result.stdout.splitlines())
    assert head == ["message", "actor", "queue", "age", "failures", "next", "try", "error"]
    assert first[:3] == ["a1111111", "send_mail", "mail"]
    assert first[-2:] == ["now", "-"]
    assert second[:3] == ["b2222222", "send_mail", "mail"]
    assert "no broker" in result.stdout
    assert re.search(r"  in (5\d|60)(\.\d+)? s  ", result.stdout)


def test_json_has_every_field(command, shop):
    shop.row("a-1", failures=4, age=120_000)
    shop.row("a-2", owner="a process")
    failed, publishing = command.json("outbox", "list", shop.app)
    assert 120_000 <= failed.pop("age_ms") < 180_000
    assert 0 < failed.pop("due_in_ms") <= 60_000
    assert failed == {
        "message_id": "a-1",
        "kind": "message",
        "actor": "send_mail",
        "queue": "mail",
        "failures": 4,
        "error": "no\nbroker",
        "publishing": False,
    }
    assert (publishing["publishing"], publishing["error"]) == (True, None)
    (row,) = re.findall(r"^\| `outbox list` \| (.*) \|$", (ROOT / "docs/operating.md").read_text(), re.MULTILINE)
    assert set(publishing) <= set(re.findall(r"\b[a-z_]+\b", row))


def test_a_long_list_says_that_it_is_cut(command, shop):
    for number in range(3):
        shop.row(f"m-{number}")
    result = command("outbox", "list", shop.app, "--limit", 2)
    assert len(result.stdout.splitlines()) == 3
    assert result.stderr == "Only the oldest 2 are listed; --limit lists more.\n"


@pytest.mark.parametrize("command_name", ["list", "retry", "purge"])
def test_an_empty_outbox_is_no_finding(command, shop, command_name):
    result = command("outbox", command_name, shop.app, "--actor", "send_mail")
    assert result.exit_code == 0, result.output
    assert command.json("outbox", "list", shop.app) == []


@pytest.mark.parametrize("command_name", ["list", "retry", "purge"])
@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [
        ("--actor", "send_mial", "; did you mean 'send_mail'?"),
        ("--actor", "load", "."),
        ("--queue", "mial", "; did you mean 'mail'?"),
        ("--queue", "imprt", "; did you mean 'import'?"),
        ("--id", "zzz", "."),
    ],
)
def test_nothing_found_says_so_with_the_nearest_name(command, shop, command_name, option, value, hint):
    shop.row("m-1")
    result = command("outbox", command_name, shop.app, option, value)
    assert result.exit_code == 1
    assert result.stderr == f"Nothing in the outbox matches {option} {value}: 0 of 1{hint}\n"
    assert shop.ids() == ["m-1"]


def test_retry_makes_messages_due_by_a_unique_beginning_of_their_id(command, shop):
    shop.row("a-1", failures=3)
    shop.row("b%1", failures=3)
    shop.row("b_2", failures=3)
    result = command("outbox", "retry", shop.app, "--id", "b%")
    assert (result.exit_code, result.stdout) == (0, "1 message due now.\n")
    due = {row["message_id"]: row["due_in_ms"] == 0 for row in command.json("outbox", "list", shop.app)}
    assert due == {"a-1": False, "b%1": True, "b_2": False}
    assert command.json("outbox", "retry", shop.app) == {"count": 3, "dry_run": False}


@pytest.mark.parametrize(("count", "shown"), [(3, "m-0, m-1, m-2"), (5, "m-0, m-1, m-2, …")])
def test_a_beginning_of_several_ids_is_refused(command, shop, count, shown):
    for number in range(count):
        shop.row(f"m-{number}")
    assert command.refuses("outbox", "retry", shop.app, "--id", "m") == (
        f"Error: Several messages of the outbox begin with 'm' ({shown}); write more characters."
    )


def test_a_purge_of_the_outbox_asks_first_and_deletes_the_selected_messages(command, shop):
    shop.row("m-1")
    shop.row("m-2")
    shop.row("l-1", "load", "import")
    result = command("outbox", "purge", shop.app, answers="n\n")
    assert result.exit_code == 1
    assert "Permanently delete 3 messages (2 of send_mail in mail, 1 of load in import)" in result.stderr
    assert command.json("outbox", "purge", shop.app, "--dry-run") == {"count": 3, "dry_run": True}
    assert len(shop.ids()) == 3
    result = command("outbox", "purge", shop.app, "--actor", "load", "--yes")
    assert (result.exit_code, result.stdout) == (0, "1 message deleted.\n")
    result = command("outbox", "purge", shop.app, "-q", "mail", answers="y\n")
    assert result.stdout.endswith("2 messages deleted.\n")
    assert shop.ids() == []


@pytest.mark.parametrize("words", [("list",), ("retry",), ("purge",), ("relay",)])
def test_an_app_without_an_outbox_gets_an_error_that_says_how_to_add_one(command, words, monkeypatch):
    monkeypatch.delitem(sys.modules, "django_dramatiq", raising=False)
    app = command.app("@dramatiq.actor\ndef job():\n    pass\n")
    said = command.refuses("outbox", *words, app)
    assert said.startswith("Error: The broker has no outbox. ")
    assert "install(broker, outbox=SqlOutbox(engine))" in said
    monkeypatch.setitem(sys.modules, "django_dramatiq", sys)
    assert "DjangoOutbox to MIDDLEWARE of DRAMATIQ_BROKER" in command.refuses("outbox", *words, app)


@pytest.mark.parametrize("words", [("list",), ("retry",), ("purge", "--yes")])
def test_a_missing_table_is_an_error_that_names_its_migration(command, shop, words):
    with shop.engine.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE {OUTBOX}"))
    assert command.refuses("outbox", *words, shop.app) == f"Error: The outbox has no table: {SqlOutbox.how_to_create}."


def test_a_database_that_can_t_be_read_is_one_sentence(command, shop):
    shop.engine.dispose()
    shop.file.write_bytes(b"no database" * 100)
    said = command.refuses("outbox", "list", shop.app)
    assert said.startswith("Error: SQLite refuses a statement (DatabaseError: ")


# In other commands.


@pytest.mark.parametrize(
    "words",
    [("outbox", "list"), ("outbox", "retry"), ("outbox", "purge", "--yes"), ("keys", "show"), ("keys", "forget")],
)
@pytest.mark.parametrize(
    ("url", "start"),
    [
        ("postgresql+psycopg://shop:secret@localhost:1/shop", "PostgreSQL can't be reached at localhost:1 ("),
        ("mysql+pymysql://shop:secret@localhost:1/shop", "MariaDB can't be reached at localhost:1 ("),
        ("sqlite:////nowhere/shop.db", "SQLite can't be reached at /nowhere/shop.db (OperationalError: unable to open"),
    ],
)
def test_every_command_has_the_same_sentence_for_a_database_that_is_down(command, words, url, start):
    app = command.app(
        """
        @dramatiq.actor(idempotency_key="order:{order_id}")
        def charge(order_id): pass
        """,
        broker=f"""
from sqlalchemy import create_engine
from dramatiq_policies.sql import SqlOutbox, SqlStore
engine = create_engine({url!r})
broker = StubBroker()
install(broker, outbox=SqlOutbox(engine), idempotency=Idempotency(SqlStore(engine)))
dramatiq.set_broker(broker)
""",
    )
    said = command.refuses(*words, *([f"{app}:charge", "7"] if words[0] == "keys" else [app]))
    assert said.startswith(f"Error: {start}")
    assert "secret" not in said
    assert "sqlalche.me" not in said


def test_the_outbox_has_a_row_among_the_queues(command, shop):
    shop.row("m-1", age=90_000)
    result = command("queues", shop.app)
    assert result.exit_code == 0
    name, ready, delayed, running, dead, *oldest = result.stdout.splitlines()[-1].split()
    assert (name, ready, delayed, running, dead) == ("(outbox)", "1", "-", "-", "-")
    assert oldest[:2] == ["1", "m"]
    *queues, found = command.json("queues", shop.app)
    assert [queue["queue"] for queue in queues] == ["import", "mail"]
    assert not any("outbox" in queue for queue in queues)
    assert (found["queue"], found["outbox"], found["ready"], found["dead"]) == ("outbox", True, 1, None)
    assert 90_000 <= found["oldest_ms"] < 150_000


def test_only_named_queues_are_shown_without_it(command, shop):
    assert [one["queue"] for one in command.json("queues", shop.app, "-q", "mail")] == ["mail"]


def test_a_breach_of_its_threshold_is_one_of_the_queues(command, shop):
    app = shop.declare(monitored("outbox=Threshold(ready=2, oldest=60_000)"))
    shop.row("m-1", age=90_000)
    result = command("queues", app, "--fail-on-breach")
    assert result.exit_code == 1
    assert result.stderr.startswith("Outbox: the oldest message has waited for 1 m 3")


def test_a_database_that_can_t_be_read_hides_no_queue(command, shop):
    with shop.engine.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE {OUTBOX}"))
    result = command("queues", shop.app)
    assert result.exit_code == 0
    assert "mail" in result.stdout
    assert result.stderr == f"The outbox has no table: {SqlOutbox.how_to_create}.\n"


def test_fail_on_breach_exits_with_2_if_the_outbox_can_t_be_read(command, shop):
    app = shop.declare(monitored("outbox=Threshold(ready=2)"))
    with shop.engine.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE {OUTBOX}"))
    assert command("queues", app, "--fail-on-breach").exit_code == 2
    assert command("queues", app, "--fail-on-breach", "-q", "mail").exit_code == 0


@pytest.mark.parametrize("terminal", [False, True])
def test_a_watch_shows_that_the_database_can_t_be_read(command, shop, monkeypatch, terminal):
    with shop.engine.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE {OUTBOX}"))

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    result = command("queues", "--watch", shop.app, env={"FORCE_COLOR": "1"} if terminal else None)
    assert "mail" in result.stdout
    # On a terminal the table fills the screen: the sentence is below the table.
    assert "The outbox has no table" in (result.stdout if terminal else result.stderr)
    assert ("The outbox has no table" in result.stderr) is not terminal


def codes(report):
    return {finding["code"] for finding in report["findings"]}


def test_check_finds_an_outbox_without_a_threshold_and_a_threshold_without_an_outbox(command, shop):
    threshold = "outbox=Threshold(ready=2)"
    assert "DP031" in codes(command.json("check", shop.declare(monitored()), code=1))
    assert "DP031" not in codes(command.json("check", shop.declare(monitored(threshold)), code=1))
    without = f"broker = StubBroker()\ninstall(broker, {monitored(threshold)})\ndramatiq.set_broker(broker)\n"
    app = command.app("@dramatiq.actor\ndef job():\n    pass\n", broker=without)
    assert "DP031" in codes(command.json("check", app, code=1))


def test_check_live_finds_a_missing_table_and_messages_without_a_relay(command, shop):
    found = command.json("check", "--live", shop.app, code=1)
    assert not codes(found) & {"DP112", "DP113"}
    assert found["live"]["outbox_pending"] == 0
    shop.row("m-1", age=3_600_000)
    (finding,) = [
        one for one in command.json("check", "--live", shop.app, code=1)["findings"] if one["code"] == "DP113"
    ]
    assert finding["message"].startswith("1 message waits in the outbox, the oldest for 1 h")
    with shop.engine.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE {OUTBOX}"))
    (finding,) = [
        one for one in command.json("check", "--live", shop.app, code=1)["findings"] if one["code"] == "DP112"
    ]
    assert finding["message"] == f"The outbox has no table: {SqlOutbox.how_to_create}"


def test_the_functions_work_without_the_command(command, shop):
    broker = ops.load_broker(shop.app)
    shop.row("m-1")
    assert ops.read_outbox(broker).pending == 1
    assert ops.purge_outbox(broker, ops.select_outbox(broker, actor="send_mail")) == 1
    assert ops.list_outbox(broker) == []
