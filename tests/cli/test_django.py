"""The command on a Django project: by ``--django``, by DJANGO_SETTINGS_MODULE, by ``manage.py policies``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = "examples.django_shop.settings"
COMMAND = [sys.executable, "-m", "dramatiq_policies"]
MANAGE = [sys.executable, str(ROOT / "examples/django_shop/manage.py"), "policies"]

pytest.importorskip("django_dramatiq")


def run(command, *args, settings=SETTINGS, cwd=ROOT, **env):
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    environment.update({"PYTHONPATH": str(ROOT), "BROKER_URL": "stub://", **env})
    if settings is not None:
        environment["DJANGO_SETTINGS_MODULE"] = settings
    return subprocess.run(
        [*command, *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


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
def test_without_an_app_the_actors_that_rundramatiq_finds_are_checked(command, more, settings):
    done = run(command, "check", *more, settings=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Ready: 3 actors, 0 errors, 1 warning, 0 exempt."


def test_an_actor_is_named_alone_or_with_its_module_and_models_are_there():
    for target in ("send_confirmation", "examples.django_shop.tasks:send_confirmation"):
        done = run(COMMAND, "explain", target, "MailTimeout", "--format", "json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[0]["outcome"] == "retried"


def test_arguments_beside_the_app_stay_what_they_are():
    done = run(COMMAND, "dead", "show", "0123", "--django")
    assert done.returncode == 2
    assert "'0123'" in done.stderr
    done = run(COMMAND, "dead", "list", "examples.django_shop.tasks")
    assert (done.returncode, done.stderr) == (0, "No dead letters.\n")


def test_without_settings_it_says_how_to_name_them_and_finds_those_of_manage_py(tmp_path):
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
    done = run([sys.executable, "-c", code])
    assert "MIDDLEWARE of DRAMATIQ_BROKER in your Django settings" in done.stderr
