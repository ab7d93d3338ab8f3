"""A Django project as an application: Django set up, and the actors found as ``rundramatiq`` finds them."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from .app import OperationError, extend_path, importing

__all__ = ["DJANGO", "set_up_django"]

#: Stands for the application where Django's settings name the broker.
DJANGO = "django"

_SETTINGS = "DJANGO_SETTINGS_MODULE"
_IN_MANAGE_PY = re.compile(rf"{_SETTINGS}['\"]\s*,\s*['\"]([\w.]+)['\"]")


def set_up_django(settings: str | None = None, path: Iterable[str] = (".",)) -> None:
    """Set up Django and import every module of actors, as ``manage.py rundramatiq`` does.

    Parameters:
      settings: The settings module. Default: ``DJANGO_SETTINGS_MODULE``, else the module in ``manage.py``.
      path: The folders to put before ``sys.path``.

    Raises:
      OperationError: Django is not installed, no settings are named, or an import fails.
    """
    extend_path(path)
    if settings is not None:
        os.environ[_SETTINGS] = settings
    elif not os.environ.get(_SETTINGS):
        os.environ[_SETTINGS] = _from_manage_py(path)
    named = os.environ[_SETTINGS]
    try:
        import django
        from django.apps import apps
    except ImportError:
        raise OperationError('Django is not installed: pip install "Django>=4.2"') from None
    with importing(named):
        if not apps.ready:
            django.setup()
        for module in _modules_of_actors():
            importlib.import_module(module)


def _from_manage_py(path: Iterable[str]) -> str:
    for folder in path:
        file = Path(folder, "manage.py")
        if file.is_file() and (found := _IN_MANAGE_PY.search(file.read_text(errors="replace"))):
            return found[1]
    raise OperationError(f"No Django settings: set {_SETTINGS}, or pass --settings package.settings.")


def _modules_of_actors() -> list[str]:
    from django.apps import apps

    if apps.is_installed("django_dramatiq"):
        from django_dramatiq.management.commands.rundramatiq import Command

        return list(Command(stdout=open(os.devnull, "w")).discover_tasks_modules())  # noqa: PTH123
    from django.utils.module_loading import module_has_submodule

    return [f"{one.name}.tasks" for one in apps.get_app_configs() if module_has_submodule(one.module, "tasks")]
