"""The command on a Django project: by ``--django``, by DJANGO_SETTINGS_MODULE, by ``manage.py policies``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ..forked import run_forked

ROOT = Path(__file__).parents[2]
SETTINGS = "examples.django_shop.settings"
COMMAND = ["-m", "dramatiq_policies"]
MANAGE = [str(ROOT / "examples/django_shop/manage.py"), "policies"]

pytest.importorskip("django_dramatiq")


def run(command, *args, settings=SETTINGS, cwd=ROOT, **env):
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    environment.update({"PYTHONPATH": str(ROOT), "BROKER_URL": "stub://", **env})
    if settings is not None:
        environment["DJANGO_SETTINGS_MODULE"] = settings
    return run_forked([*command, *args], cwd=cwd, env=environment)


@pytest.mark.parametrize(
    ("command", "more", "settings"),
    [
        (COMMAND, [], SETTINGS),
        (COMMAND, ["--django"], SETTINGS),
        (COMMAND, [f"--settings={SETTINGS}"], None),
        (MANAGE, [], None),
    ],
    ids=["by the environment", "--django", "--settings", "manage.py policies"],
)
def test_check_without_an_app_checks_the_actors_that_rundramatiq_finds(command, more, settings):
    done = run(command, "check", *more, settings=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Ready: 3 actors, 0 errors, 1 warning, 0 exempt."


def test_an_actor_is_named_alone_or_with_its_module_and_models_are_there():
    for target in ("send_confirmation", "examples.django_shop.tasks:send_confirmation"):
        done = run(COMMAND, "explain", target, "MailTimeout", "--format", "json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[0]["outcome"] == "retried"


def test_arguments_beside_the_app_are_not_taken_for_the_app():
    done = run(COMMAND, "dead", "show", "0123", "--django")
    assert done.returncode == 2
    assert "'0123'" in done.stderr
    done = run(COMMAND, "dead", "list", "examples.django_shop.tasks")
    assert (done.returncode, done.stderr) == (0, "No dead letters.\n")


def test_a_command_without_settings_names_the_option_and_finds_those_of_manage_py(tmp_path):
    done = run(COMMAND, "check", "--django", settings=None, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "Error: No Django settings: set DJANGO_SETTINGS_MODULE, or pass --settings package.settings.\n"
    )
    (tmp_path / "manage.py").write_text(f"os.environ.setdefault('DJANGO_SETTINGS_MODULE', '{SETTINGS}')\n")
    done = run(COMMAND, "check", "--django", settings=None, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_settings_that_are_not_there_are_one_sentence():
    done = run(COMMAND, "check", "--settings", "no.such.settings", settings=None)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: 'no.such.settings' can't be imported: ModuleNotFoundError")


def test_a_missing_idempotency_names_middleware_where_there_is_no_install():
    code = (
        "import os, django\ndjango.setup()\nimport dramatiq\nfrom dramatiq_policies import Idempotency\n"
        "broker = dramatiq.get_broker()\n"
        "broker.middleware = [one for one in broker.middleware if not isinstance(one, Idempotency)]\n"
        "dramatiq.actor(idempotency_key='x')(lambda: None)"
    )
    done = run(["-c", code])
    assert "MIDDLEWARE of DRAMATIQ_BROKER in your Django settings" in done.stderr


def test_a_second_middleware_of_a_kind_names_middleware_where_there_is_no_install():
    code = (
        "import django\ndjango.setup()\nimport dramatiq\nfrom dramatiq_policies import ErrorClassifier\n"
        "dramatiq.get_broker().middleware.append(ErrorClassifier())\ndramatiq.actor(lambda: None)"
    )
    done = run(["-c", code])
    assert "two ErrorClassifier middleware. List each once in MIDDLEWARE of DRAMATIQ_BROKER" in done.stderr
    assert "install()" not in done.stderr


@pytest.mark.parametrize("command", [COMMAND, MANAGE], ids=["dramatiq-policies", "manage.py policies"])
def test_an_actor_that_is_misspelt_without_its_module_gets_the_nearest_name(command):
    done = run(command, "explain", "send_confirmatoin")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: Django's broker has no actor 'send_confirmatoin'; did you mean 'send_confirmation'?\n"
    )


_OF_THE_GUIDE = ("shop/tasks.py", "shop/tests.py")
_OF_STARTPROJECT = """
SECRET_KEY = "of a test"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
"""


def test_a_project_copied_from_the_guide_passes_check_and_its_own_tests(tmp_path):
    page = (ROOT / "docs/frameworks.md").read_text()
    copied = {name: page.partition(f"# {name}\n")[2].partition("```")[0] for name in ("settings.py", *_OF_THE_GUIDE)}
    (tmp_path / "guide_settings.py").write_text(f"{_OF_STARTPROJECT}{copied.pop('settings.py')}")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    for name, source in copied.items():
        (tmp_path / name).write_text(source)
    place = {"settings": "guide_settings", "cwd": tmp_path, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    tested = run(["-m", "django"], "test", "shop", **place)
    assert "Ran 1 test" in tested.stderr, tested.stderr
    assert tested.returncode == 0, tested.stderr
    done = run(COMMAND, "check", **place)
    assert done.stdout.splitlines()[-1] == "Ready: 1 actor, 0 errors, 1 warning, 0 exempt."


SETTINGS_WITH_OUTBOX = """
SECRET_KEY = "of a test"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django_dramatiq", "dramatiq_policies.contrib.django", "mailer"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.sqlite3"}}
DRAMATIQ_BROKER = {
    "BROKER": "dramatiq.brokers.stub.StubBroker",
    "OPTIONS": {},
    "MIDDLEWARE": ["dramatiq_policies.ErrorClassifier", "dramatiq_policies.contrib.django.DjangoOutbox"],
}
"""


def test_the_outbox_of_a_project_is_listed_once_its_table_is_migrated(tmp_path):
    (tmp_path / "shop_settings.py").write_text(SETTINGS_WITH_OUTBOX)
    (tmp_path / "mailer").mkdir()
    (tmp_path / "mailer" / "__init__.py").touch()
    (tmp_path / "mailer" / "tasks.py").write_text("import dramatiq\n\n@dramatiq.actor\ndef send_mail():\n    pass\n")
    manage = ["-m", "django"]
    place = {"settings": "shop_settings", "cwd": tmp_path, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    before = run(manage, "policies", "outbox", "list", **place)
    assert before.returncode == 2
    assert "The outbox has no table: run" in before.stderr
    live = run(COMMAND, "check", "--live", "--django", "--format", "json", **place)
    assert "DP112" in {finding["code"] for finding in json.loads(live.stdout)["findings"]}
    assert run(manage, "migrate", **place).returncode == 0
    after = run(manage, "policies", "outbox", "list", **place)
    assert (after.returncode, after.stderr) == (0, "The outbox is empty.\n")
    wrong = run(COMMAND, "outbox", "list", "--django", "--actor", "send_mial", **place)
    assert wrong.returncode == 1
    assert "did you mean 'send_mail'?" in wrong.stderr
