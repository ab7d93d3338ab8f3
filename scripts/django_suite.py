"""Run Django's own tests of task backends with DramatiqBackend in the place of Django's two.

python scripts/django_suite.py SOURCE [ARGUMENTS OF DJANGO'S test COMMAND...]

SOURCE is Django's source with its tests: a checkout, or an unpacked sdist. The script copies the folder tests/tasks and runs the tests
against the installed Django 6.0 or newer, on a StubBroker. A DramatiqBackend without a worker replaces DummyBackend. A
DramatiqBackend whose `enqueue` has a worker run the task replaces ImmediateBackend. scripts/django_suite/ has both backends, and the
list of tests left out, each with a reason.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path)
    options, arguments = parser.parse_known_args()
    tests = options.source / "tests" / "tasks"
    if not (tests / "test_tasks.py").exists():
        parser.error(f"{options.source} is no source of Django 6 with its tests.")
    with tempfile.TemporaryDirectory(prefix="dp-django-suite-") as folder:
        shutil.copytree(tests, Path(folder, "tasks"), ignore=shutil.ignore_patterns("__pycache__"))
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "suite_settings",
            "PYTHONPATH": str(HERE / "django_suite"),
        }
        command = [sys.executable, "-m", "django", "test", "tasks", *arguments]
        code = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    print(f"django_suite: Django {version('django')}, Dramatiq {version('dramatiq')}")
    return code


if __name__ == "__main__":
    sys.exit(main())
