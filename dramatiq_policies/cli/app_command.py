"""Commands on an application: ``APP`` as for the ``dramatiq`` command, or a Django project."""

from __future__ import annotations

import os
from typing import Any

import click
from dramatiq.broker import Broker

from .. import ops

__all__ = ["AppCommand", "load_app"]


def load_app(app: str, path: tuple[str, ...]) -> Broker:
    """Load APP and return its broker.

    Raises:
      OperationError: The application can't be loaded, or declares neither actors nor queues.
    """
    broker = ops.load_broker(app, path)
    if not ops.known_queues(broker):
        ops.require_actors(app, broker)
    return broker


class AppCommand(click.Command):
    """A command with an optional ``APP`` for Django projects: pass ``--django`` or set ``DJANGO_SETTINGS_MODULE``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["--django"],
                is_flag=True,
                help="Set Django up first; you may leave APP out. The variable DJANGO_SETTINGS_MODULE does the same.",
            ),
            click.Option(["--settings"], metavar="MODULE", help="Django's settings module; implies --django."),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        arguments = [str(one.name) for one in self.params if isinstance(one, click.Argument)]
        if "app" in arguments and not ctx.resilient_parsing and _wants_django(ctx, args):
            given, _, _ = self.make_parser(ctx).parse_args(list(args))
            if any(not isinstance(given.get(name), str) for name in arguments):
                args = [ops.DJANGO, *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        django, settings = ctx.params.pop("django"), ctx.params.pop("settings")
        if django or settings or ctx.obj == ops.DJANGO or os.environ.get("DJANGO_SETTINGS_MODULE"):
            ops.set_up_django(settings, ctx.params.get("path", (".",)))
        return super().invoke(ctx)


def _wants_django(ctx: click.Context, args: list[str]) -> bool:
    return (
        ctx.obj == ops.DJANGO
        or "--django" in args
        or any(one == "--settings" or one.startswith("--settings=") for one in args)
        or bool(os.environ.get("DJANGO_SETTINGS_MODULE"))
    )
