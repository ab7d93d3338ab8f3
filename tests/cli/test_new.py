"""`dramatiq-policies new`: the design first, then failing tests, then the job."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dramatiq_policies import ops
from dramatiq_policies.ops.checks.gate import read_toml

from .conftest import PREAMBLE

ROOT = Path(__file__).parents[2]
DESIGN = """
[job]
purpose = "the customer learns that the order was taken"
trigger = "the checkout, after its transaction"
input = ["order_id: int", "email: str"]
effect = "one e-mail"
criticality = "high"
queue = "mail"
timeout = 30_000
idempotency_key = "order-confirmation:{order_id}"

[errors]
transient = ["shop.mail:MailTimeout", "shop.mail:RateLimited", "builtins:ConnectionError"]
permanent = ["shop.mail:InvalidEmail"]
configuration = ["shop.mail:MissingCredentials"]
"""
MAIL = """
class MailTimeout(Exception): pass
class InvalidEmail(Exception): pass
class MissingCredentials(Exception): pass
class RateLimited(Exception):
    def __init__(self, seconds, /):
        super().__init__(f"{seconds:d} s")

outbox = {}

def is_sent(order_id, email):
    return order_id in outbox

def is_open():
    return True
"""
FILE = "shop/jobs/send_confirmation.py"
TESTS = "tests/test_send_confirmation.py"


@pytest.fixture
def shop(command):
    (command.folder / "shop").mkdir()
    (command.folder / "shop" / "__init__.py").touch()
    (command.folder / "shop" / "mail.py").write_text(MAIL)
    (command.folder / "design.toml").write_text(DESIGN)
    yield command.folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


def redesign(shop, *changes):
    text = DESIGN
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (shop / "design.toml").write_text(text)


def run(folder, *args):
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    # Hypothesis and others take longer to import than the tests run.
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return subprocess.run([sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True, check=False)


def pytest_in(folder):
    # As an installed package registers it.
    return run(
        folder,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:dramatiq_policies",
        "-p",
        "dramatiq_policies.testing.pytest_plugin",
        "tests",
    )


def test_new_writes_the_job_with_its_rules_and_its_tests(command, shop):
    result = command("new", FILE, "--design", "design.toml")
    assert result.exit_code == 0, result.output
    assert f"wrote {FILE}\nwrote {TESTS}\n" in result.stdout
    assert (
        (shop / FILE).read_text()
        == '''\
from __future__ import annotations

import dramatiq
from dramatiq_policies import RetryPolicy

from shop.mail import InvalidEmail, MailTimeout, MissingCredentials, RateLimited


@dramatiq.actor(
    queue_name="mail",
    retry_on={
        MailTimeout: RetryPolicy(attempts=5),
        RateLimited: RetryPolicy(attempts=5),
        ConnectionError: RetryPolicy(attempts=5),
    },
    discard_on=InvalidEmail,
    alert_on=MissingCredentials,
    idempotency_key="order-confirmation:{order_id}",
    timeout=30_000,
    tags={"criticality": "high"},
)
def send_confirmation(order_id: int, email: str) -> None:
    """The customer learns that the order was taken.

    Trigger: the checkout, after its transaction
    Effect: one e-mail
    """
    raise NotImplementedError("send_confirmation is not written yet")
'''
    )
    assert (shop / "shop/jobs/__init__.py").exists()


def test_the_generated_job_passes_check_as_it_stands(command, shop):
    command("new", FILE, "--design", "design.toml")
    checked = run(
        shop, "-m", "dramatiq_policies", "check", "shop.jobs.send_confirmation", "--require-tag", "criticality"
    )
    assert checked.returncode == 0, checked.stdout


LONG = "shop/jobs/send_confirmation_to_the_customer.py"


@pytest.mark.parametrize(("file", "width"), [(FILE, "88"), (FILE, "120"), (LONG, "88")])
def test_the_generated_files_are_formatted_as_ruff_formats(command, shop, file, width):
    long = [f"shop.mail:Err{'o' * 20}r{number}" for number in range(4)]
    (shop / "shop" / "mail.py").write_text(MAIL + "".join(f"class {one[10:]}(Exception): pass\n" for one in long))
    redesign(
        shop,
        ('["shop.mail:InvalidEmail"]', str(long).replace("'", '"')),
        (
            '["order_id: int", "email: str"]',
            '["order_id: int", "email: str", "total: str | None", "languages: list[str]", "items: int"]',
        ),
    )
    command("new", file, "--design", "design.toml")
    ruff = [sys.executable, "-m", "ruff"]
    if run(shop, "-c", "import ruff").returncode:
        ruff = [str(Path(sys.executable).parent / "ruff")]
    for arguments in (["format", "--diff"], ["check", "--select", "E,F,I,W,B"]):
        checked = subprocess.run(
            [*ruff, *arguments, "--no-cache", "--isolated", "--line-length", width, "shop/jobs", "tests"],
            cwd=shop,
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


def write_the_job(shop, body):
    todo = 'raise NotImplementedError("send_confirmation is not written yet")'
    written = (shop / FILE).read_text().replace(todo, body)
    (shop / FILE).write_text(written + "\n\nfrom shop.mail import outbox\n")


def write_its_effects(shop):
    specified = (shop / TESTS).read_text()
    for old, new in (
        ('return one e-mail.\n    """\n', 'return one e-mail.\n    """\n    return dict(outbox)\n'),
        ('"""Undo it. To be written."""\n', '"""Undo it."""\n    outbox.clear()\n'),
        ("MissingCredentials, RateLimited\n", "MissingCredentials, RateLimited, outbox\n"),
    ):
        assert specified.count(old) == 1
        specified = specified.replace(old, new)
    (shop / TESTS).write_text(specified)


@pytest.mark.parametrize(
    "once", ['idempotency_key = "order-confirmation:{order_id}"', 'done_when = "shop.mail:is_sent"']
)
def test_the_generated_tests_fail_until_the_job_and_its_effects_are_written_and_pass_then(command, shop, once):
    redesign(shop, ('idempotency_key = "order-confirmation:{order_id}"', once))
    command("new", FILE, "--design", "design.toml")
    before = pytest_in(shop)
    assert before.returncode == 1, before.stdout + before.stderr
    assert "passed" not in before.stdout, before.stdout
    assert "error" not in before.stdout.splitlines()[-1]
    assert "send_confirmation is not written yet" in before.stdout
    write_the_job(shop, "outbox[order_id] = email")
    if "key" in once:
        half = pytest_in(shop)
        assert "9 passed, 1 warning" in half.stdout, half.stdout
        assert "does not see the job" in half.stdout
    write_its_effects(shop)
    after = pytest_in(shop)
    assert "9 passed in" in after.stdout, after.stdout + after.stderr


@pytest.mark.parametrize(
    "missing", ["purpose", "trigger", "effect", "criticality", "queue", "timeout", "idempotency_key"]
)
def test_a_design_without_an_answer_is_refused(command, shop, missing):
    lines = [line for line in DESIGN.splitlines() if not line.startswith(f"{missing} ")]
    (shop / "design.toml").write_text("\n".join(lines))
    result = command("new", FILE, "--design", "design.toml")
    assert result.exit_code == 1
    assert f"job.{missing}: " in result.stderr
    assert not (shop / "shop" / "jobs").exists()
    assert not (shop / "tests").exists()


def test_all_that_is_missing_is_named_at_once(command, shop):
    (shop / "design.toml").write_text("[job]\npurpose = ' '\n")
    result = command("new", FILE, "--design", "design.toml")
    names = [line.split(":")[0].strip() for line in result.stderr.splitlines()[1:]]
    assert names == [
        *(f"job.{name}" for name in ("purpose", "trigger", "effect", "criticality", "queue", "input", "timeout")),
        *(f"errors.{name}" for name in ("transient", "permanent", "configuration")),
        "job.idempotency_key",
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"mail"', '"default"', "job.queue: a queue other than"),
        ("30_000", "0", "job.timeout: "),
        ("{order_id}", "{order}", "'order' is not an argument"),
        ("{order_id}", "", "without a field all messages share one key"),
        ('"order_id: int"', '"order id"', "job.input: "),
        (
            "shop.mail:InvalidEmail",
            "shop.mail:NoSuchError",
            "errors.permanent: 'shop.mail:NoSuchError' can't be imported",
        ),
        ("shop.mail:InvalidEmail", "shop.mail:outbox", "is not an exception class"),
        ("shop.mail:InvalidEmail", "shop.mail:MailTimeout", "is also in errors.transient"),
        ("{order_id}", "{order_id", "job.idempotency_key: a template with fields from the arguments, got"),
        ('"order_id: int"', '"*order_id"', "job.input: "),
        (
            'idempotency_key = "order-confirmation:{order_id}"',
            'idempotent = "yes"',
            "job.idempotent: true or false, got 'yes'",
        ),
        (
            'idempotency_key = "order-confirmation:{order_id}"',
            'done_when = "shop.mail:outbox"',
            "job.done_when: 'shop.mail:outbox' is not callable",
        ),
        (
            'idempotency_key = "order-confirmation:{order_id}"',
            "done_when = 5",
            'job.done_when: expected "module:Name", got 5',
        ),
        (
            'idempotency_key = "order-confirmation:{order_id}"',
            'done_when = "shop.mail:is_open"',
            "job.done_when: 'shop.mail:is_open' does not take the parameters of the job, (order_id, email)",
        ),
        ("[job]", "job = 5", "expected the tables [job] and [errors]"),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(command, shop, old, new, said):
    redesign(shop, (old, new))
    result = command("new", FILE, "--design", "design.toml")
    assert result.exit_code == 1
    assert said in result.stderr
    assert not (shop / "shop" / "jobs").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("purpose =", "prupose =", "job.prupose is unknown; did you mean 'purpose'? Known names: job.purpose, "),
        ("[errors]", "[errors]\nzzz = 1", "errors.zzz is unknown. Known names: errors.transient, "),
        ("[errors]", "[error]", "error is unknown; did you mean 'errors'? Known names: job, errors."),
    ],
)
def test_an_unknown_field_of_the_design_is_refused(command, shop, old, new, said):
    redesign(shop, (old, new))
    assert said in command.refuses("new", FILE, "--design", "design.toml")
    assert not (shop / "shop" / "jobs").exists()


def test_a_job_without_arguments_may_have_a_constant_key(command, shop):
    redesign(shop, ('["order_id: int", "email: str"]', "[]"), ("order-confirmation:{order_id}", "nightly"))
    assert command("new", FILE, "--design", "design.toml").exit_code == 0
    assert '    idempotency_key="nightly",\n' in (shop / FILE).read_text()
    assert run(shop, "-m", "dramatiq_policies", "check", "shop.jobs.send_confirmation").returncode == 0
    write_the_job(shop, 'outbox["all"] = 1')
    write_its_effects(shop)
    passed = pytest_in(shop)
    assert passed.returncode == 0, passed.stdout


def test_no_errors_is_an_answer(command, shop):
    redesign(
        shop,
        ('["shop.mail:MailTimeout", "shop.mail:RateLimited", "builtins:ConnectionError"]', "[]"),
        ('["shop.mail:InvalidEmail"]', "[]"),
        ('["shop.mail:MissingCredentials"]', "[]"),
        ('idempotency_key = "order-confirmation:{order_id}"', "idempotent = true"),
    )
    assert command("new", FILE, "--design", "design.toml").exit_code == 0
    text = (shop / FILE).read_text()
    assert "retry_on=(),\n    discard_on=(),\n    idempotent=True," in text
    assert run(shop, "-m", "dramatiq_policies", "check", "shop.jobs.send_confirmation").returncode == 0


def test_an_answer_may_hold_quotes_and_backslashes(command, shop):
    strange = 'a \\d, a "quoted" word, a """ and a backslash at last \\'
    old = {"purpose": "the customer learns that the order was taken", "trigger": "the checkout, after its transaction"}
    old |= {"effect": "one e-mail", "criticality": "high", "queue": "mail"}
    answers = {**dict.fromkeys(old, strange), "criticality": f"high\n{strange}"}
    redesign(shop, *((f'{name} = "{text}"', f"{name} = {json.dumps(answers[name])}") for name, text in old.items()))
    result = command("new", FILE, "--design", "design.toml")
    assert result.exit_code == 0, result.output
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # An escape that is none is a warning.
        job, tests = (ast.parse((shop / file).read_text()) for file in (FILE, TESTS))
    options = {one.arg: one.value for one in job.body[-1].decorator_list[0].keywords}
    assert ast.literal_eval(options["queue_name"]) == strange
    assert ast.literal_eval(options["tags"]) == {"criticality": answers["criticality"]}
    assert "\\d" in ast.get_docstring(tests)


def test_nothing_is_ever_overwritten(command, shop):
    (shop / "tests").mkdir()
    (shop / TESTS).write_text("mine\n")
    assert "overwrites no file" in command.refuses("new", FILE, "--design", "design.toml")
    assert (shop / TESTS).read_text() == "mine\n"
    assert not (shop / FILE).exists()
    # Nor if it was written while the questions were answered.
    sys.path.insert(0, str(shop))
    with pytest.raises(ops.OperationError, match="overwrites no file"):
        ops.scaffold(ops.parse_design(read_toml(Path("design.toml"))), Path(FILE), Path("tests"))
    assert not (shop / FILE).exists()
    assert "is not a module" in command.refuses("new", "shop/send-mail.py", "--design", "design.toml")
    assert "is not a module" in command.refuses("new", "/tmp/job.py", "--design", "design.toml")


def test_the_tests_find_the_broker_that_the_application_sets(command, shop):
    (shop / "shop" / "app.py").write_text(PREAMBLE + "broker = install(StubBroker())\ndramatiq.set_broker(broker)\n")
    command("new", FILE, "--design", "design.toml")
    assert "import shop.app  # noqa: F401\n" in (shop / "tests" / "conftest.py").read_text()


def test_a_conftest_of_the_project_s_own_is_left_alone(command, shop):
    (shop / "tests").mkdir()
    (shop / "tests" / "conftest.py").write_text("# mine\n")
    assert "conftest" not in command("new", FILE, "--design", "design.toml").stdout
    assert (shop / "tests" / "conftest.py").read_text() == "# mine\n"


def test_without_a_file_it_asks_with_an_example_for_each_question(command, shop):
    answers = [
        "the customer learns that the order was taken",
        "the checkout",
        "order_id: int, email: str",
        "one e-mail",
        "",
        "mail",
        "",
        "order:{order_id}",
        "shop.mail:MailTimeout, ConnectionError",
        "shop.mail:InvalidEmail",
        "",
    ]
    result = command("new", FILE, answers="\n".join(answers) + "\n")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("e.g.") == 10
    text = (shop / FILE).read_text()
    assert "timeout=30_000" in text
    assert "ConnectionError: RetryPolicy(attempts=5)" in text
    assert 'tags={"criticality": "normal"}' in text


def test_a_design_without_answers_is_incomplete(command, shop):
    result = command("new", FILE, answers="the customer learns that the order was taken\n")
    assert result.exit_code == 1
    assert "job.trigger" in result.stderr
    assert "job.purpose" not in result.stderr
    assert not (shop / FILE).exists()


def test_an_error_that_no_argument_builds_is_made_without_its_constructor(command, shop):
    picky = "class Picky(Exception):\n    def __init__(self, *, code): self.code = code\n"
    (shop / "shop" / "mail.py").write_text(MAIL + picky)
    redesign(shop, ("shop.mail:InvalidEmail", "shop.mail:Picky"))
    assert command("new", FILE, "--design", "design.toml").exit_code == 0
    assert "Picky.__new__(Picky)" in (shop / TESTS).read_text()


def test_the_second_of_two_errors_with_one_name_goes_by_its_module(command, shop):
    (shop / "shop" / "letters.py").write_text("class InvalidEmail(Exception): pass\n")
    redesign(shop, ('"shop.mail:RateLimited", ', '"shop.letters:InvalidEmail", '))
    assert command("new", FILE, "--design", "design.toml").exit_code == 0
    text = (shop / FILE).read_text()
    compile(text, FILE, "exec")
    assert "from shop.letters import InvalidEmail\n" in text
    assert "import shop.mail\n" in text
    assert "discard_on=shop.mail.InvalidEmail," in text


def test_a_module_of_which_nothing_goes_by_its_own_name_is_imported_alone(command, shop):
    (shop / "shop" / "letters.py").write_text("class InvalidEmail(Exception): pass\n")
    redesign(shop, ('["shop.mail:InvalidEmail"]', '["shop.mail:InvalidEmail", "shop.letters:InvalidEmail"]'))
    assert command("new", FILE, "--design", "design.toml").exit_code == 0
    text = (shop / FILE).read_text()
    assert "import shop.letters\nfrom shop.mail import InvalidEmail, " in text
    assert "discard_on=(InvalidEmail, shop.letters.InvalidEmail)," in text


def test_a_folder_src_is_no_part_of_the_module(command, shop):
    command("new", f"src/{FILE}", "--design", "design.toml")
    assert "from shop.jobs.send_confirmation import send_confirmation" in (shop / TESTS).read_text()


def test_a_timeout_that_looks_like_seconds_is_reported(command, shop):
    (shop / "design.toml").write_text(DESIGN.replace("30_000", "30"))
    result = command("new", FILE, "--design", "design.toml")
    assert result.exit_code == 0
    assert result.stderr == "job.timeout=30 is 30 milliseconds. For seconds write thousands: 30000.\n"
