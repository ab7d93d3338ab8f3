"""``manage.py policies``: the command ``dramatiq-policies`` on the settings' broker and the actors of all installed apps."""

from __future__ import annotations

import os
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError

__all__ = ["Command"]


class Command(BaseCommand):  # type: ignore[misc]
    help = "Run a command of dramatiq-policies: check, explain, queues, dead, outbox, keys, monitor, new."

    def run_from_argv(self, argv: list[str]) -> None:
        # All arguments are the command's, `--help` and `--format` included. `manage.py` itself has read `--settings`.
        arguments, forwarded = argv[2:], []
        skip = False
        for number, argument in enumerate(arguments):
            name, equals, value = argument.partition("=")
            if skip:
                skip = False
            elif name == "--settings":
                os.environ["DJANGO_SETTINGS_MODULE"] = value if equals else arguments[number + 1]
                skip = not equals
            else:
                forwarded.append(argument)
        self.handle(*forwarded)

    def handle(self, *args: str, **options: Any) -> None:
        try:
            from dramatiq_policies.cli import main
            from dramatiq_policies.ops.django_project import DJANGO
        except ModuleNotFoundError as error:
            raise CommandError(
                f'the command needs {error.name}: pip install "dramatiq-policies[cli]"', returncode=2
            ) from None
        sys.stdout.flush()
        main(args=list(args), prog_name="manage.py policies", obj=DJANGO)
