"""Errors, rules and actors that the tests of the ErrorClassifier share."""

from __future__ import annotations

import json
import logging

from dramatiq.middleware import (
    Middleware,
    MiddlewareError,
)

from dramatiq_policies import (
    RetryPolicy,
)

from ..support import Stage


class PaymentError(Exception):
    pass


class CardDeclined(PaymentError):
    pass


class MissingKey(Exception):
    pass


SOON = RetryPolicy(attempts=3, wait=0)


def failing(stage, *errors, name="pay", result=None, **options):
    """An actor that raises one after another, then returns the result."""
    left = list(errors)

    @stage.actor(actor_name=name, **options)
    def pay(*args, **kwargs):
        if left:
            raise left.pop(0)
        return result

    return pay


def always(stage, error, name="pay", **options):
    @stage.actor(actor_name=name, **options)
    def pay(*args, **kwargs):
        raise error

    return pay


def outcomes_of(error, **options):
    stage = Stage()
    always(stage, error, **options).send()
    return stage.run()


def raw(stage, actor="pay", queue="default", **changes):
    """Put a body on the queue as somebody else would."""
    body = {
        "queue_name": queue,
        "actor_name": actor,
        "args": [],
        "kwargs": {},
        "options": {},
        "message_id": "by-hand",
        "message_timestamp": 1_700_000_000_000,
        **changes,
    }
    stage.broker.queues["default"].put(json.dumps(body).encode())


class Refused(MiddlewareError):
    pass


class Refusing(Middleware):
    """Raises before any hook of ours."""

    def __init__(self, error):
        self.error = error

    def before_process_message(self, broker, message):
        raise self.error


def lines(caplog):
    return [r for r in caplog.records if r.name.startswith("dramatiq") and r.levelno >= logging.WARNING]


class Broken(Exception):
    def __str__(self):
        raise RuntimeError("no text")
