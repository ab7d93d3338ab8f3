"""`policy`, and the module of tasks where Django has none."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from dramatiq_policies import ConfigurationError
from dramatiq_policies.contrib.django.task_policy import OPTIONS
from dramatiq_policies.contrib.django.tasks import policy

ROOT = Path(__file__).parents[3]


def test_policy_leaves_the_function_as_it_is_and_keeps_the_options():
    def job():
        return 1

    assert policy(retry_on=ConnectionError)(job) is job
    assert getattr(job, OPTIONS) == {"retry_on": ConnectionError}


@pytest.mark.parametrize("option", ["queue_name", "priority", "actor_name"])
def test_an_option_of_the_task_is_refused(option):
    with pytest.raises(ConfigurationError, match=f"{option} is an option of the task"):
        policy(**{option: "mail"})


def test_policy_above_the_task_is_refused():
    with pytest.raises(ConfigurationError, match="Write @policy below @task"):
        policy(retry_on=ConnectionError)(partial(print))


def test_the_backend_on_a_django_without_tasks_imports_and_names_its_requirement():
    code = (
        "import sys; sys.modules['django.tasks'] = None\n"
        "import dramatiq_policies.contrib.django.tasks as tasks\n"
        "try:\n    tasks.DramatiqBackend\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == 'DramatiqBackend needs Django 6: pip install "Django>=6.0"\n'


def test_a_name_that_the_module_does_not_have_is_an_attribute_error():
    import dramatiq_policies.contrib.django.tasks as module

    with pytest.raises(AttributeError, match="no attribute 'Backend'"):
        module.Backend  # noqa: B018
