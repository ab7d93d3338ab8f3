"""Complete names of the application that you have already typed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable

import click
from dramatiq.broker import Broker

from .. import ops

__all__ = ["actor_names", "queue_names"]


def _names(of: Callable[[Broker], Iterable[str]]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        # If the last option has no value yet, Click leaves the earlier arguments unnamed.
        app = ctx.params.get("app") or next(iter(ctx.args), None)
        if app is None:
            return []
        try:
            # The application's output during the import would disturb the line.
            with contextlib.redirect_stderr(io.StringIO()):
                broker = ops.load_broker(app, ctx.params.get("path", (".",)))
        except ops.OperationError:
            return []
        return sorted(name for name in of(broker) if name.startswith(incomplete))

    return complete


queue_names = _names(ops.known_queues)
actor_names = _names(lambda broker: broker.actors)
