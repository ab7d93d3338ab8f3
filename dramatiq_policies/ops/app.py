"""Finding the application, its broker and its actors, named as the ``dramatiq`` command names them."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import dramatiq.broker
from dramatiq import get_broker, set_broker
from dramatiq.broker import Broker
from dramatiq.brokers.stub import StubBroker

from ..bundle import install
from ..common.credentials import learn_passwords, redact
from ..errors import OperationError
from ..middleware.base import PolicyMiddleware
from ..middleware.ordering import order_middleware

if TYPE_CHECKING:
    from dramatiq import Actor

__all__ = [
    "OperationError",
    "PlaceholderBroker",
    "did_you_mean",
    "extend_path",
    "find_actor",
    "find_queue",
    "import_object",
    "importing",
    "known_queues",
    "load_broker",
    "one_line",
    "redact",
    "require_actors",
]


class PlaceholderBroker(StubBroker):
    """Stands in where a module of jobs alone is looked at, and no broker is set."""


def one_line(error: BaseException) -> str:
    """An error's class and text on one line, without credentials."""
    text = " ".join(str(error).split())
    return redact(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def load_broker(app: str, path: Iterable[str] = (".",), *, stand_in: bool = False) -> Broker:
    """Import an application and return its broker, the bundle in its place and every actor's options resolved.

    Parameters:
      app: ``package.module`` (the global broker counts), ``package.module:broker``, or ``package.module:factory``, which
        is called and sets the global broker.
      path: What is put before ``sys.path``. The current folder by default.
      stand_in: Whether a StubBroker with the bundle stands in while no broker is set: for a module of jobs alone. By
        default it is what Dramatiq itself would make.

    What the application prints while it is imported goes to stderr. Nothing connects unless the application does.

    Raises:
      OperationError: If there is no such thing, or importing it fails.
    """
    extend_path(path)
    if app == "django":
        with importing(app):
            found: Any = get_broker()
        return _arranged(app, found)
    if stand_in and dramatiq.broker.global_broker is None:
        set_broker(install(PlaceholderBroker()))
    found = import_object(app)
    if found is not None and not isinstance(found, Broker):
        if not callable(found):
            raise OperationError(f"{app!r} is neither a broker nor a callable that sets one.")
        with importing(app):
            found()
        found = None
    if found is None:
        with importing(app):
            found = get_broker()
    return _arranged(app, found)


def _arranged(app: str, broker: Broker) -> Broker:
    if any(isinstance(middleware, PolicyMiddleware) for middleware in broker.middleware):
        with importing(app):
            order_middleware(broker)
    learn_passwords(broker, *broker.middleware)
    return broker


def require_actors(app: str, broker: Broker) -> None:
    """Refuse an application without actors: nothing can be said of it.

    Raises:
      OperationError: No actor is declared on the broker.
    """
    if not broker.actors:
        raise OperationError(
            f"{app} declares no actors. Name the module that imports your actors, as you name it for the dramatiq command; "
            "for a Django project pass --django."
            if app != "django"
            else "Django's installed apps declare no actors. Put them into tasks.py of an app in INSTALLED_APPS, or name the "
            "module that imports them."
        )


def find_actor(target: str, path: Iterable[str] = (".",), *, stand_in: bool = False) -> Actor[..., Any]:
    """The actor that ``app:actor`` names: an attribute of the module, or an actor's name.

    Where a factory sets the broker, ``app:factory:actor``. ``path`` and ``stand_in`` as for `load_broker`.

    Raises:
      OperationError: If there is none, with the names that come near.
    """
    app, _, name = target.rpartition(":")
    if not app and dramatiq.broker.global_broker is not None and target in dramatiq.broker.global_broker.actors:
        app = "django"  # It is set up, and has declared the actor.
    if not app:
        raise OperationError(f"{target!r} names no actor; write it as app:actor.")
    broker = load_broker(app, path, stand_in=stand_in)
    if ":" not in app and app != "django":
        with contextlib.suppress(OperationError):
            found = import_object(target)
            actor = getattr(found, "__actor__", found)
            if hasattr(actor, "send_with_options") and hasattr(actor, "broker"):
                return actor  # type: ignore[no-any-return]
    if name in broker.actors:
        return broker.actors[name]
    raise OperationError(f"{app} has no actor {name!r}{did_you_mean(name, broker.actors)}")


def find_queue(broker: Broker, queue: str) -> str:
    """The queue's name, if the broker knows it.

    Raises:
      OperationError: If it does not, with the names that come near.
    """
    known = known_queues(broker)
    if queue not in known:
        raise OperationError(f"No actor uses a queue {queue!r}{did_you_mean(queue, known)}")
    return queue


def known_queues(broker: Broker) -> list[str]:
    """The queues that are declared, without those of delayed messages, by name."""
    return sorted({queue for queue in broker.get_declared_queues() if not queue.endswith((".DQ", ".XQ"))})


def import_object(path: str) -> Any:
    """What ``module:attribute.attribute`` leads to; None for a module alone.

    Raises:
      OperationError: If it leads nowhere.
    """
    name, _, attributes = path.partition(":")
    if name.endswith(".py"):
        raise OperationError(f"{path!r} is a file; name the module, {name[:-3].replace(os.sep, '.')!r}.")
    with importing(path):
        module = importlib.import_module(name)
    if not attributes:
        return None
    try:
        return functools.reduce(getattr, attributes.split("."), module)
    except AttributeError:
        public = [known for known in vars(module) if not known.startswith("_")]
        raise OperationError(f"{name} has no {attributes!r}{did_you_mean(attributes, public)}") from None


@contextlib.contextmanager
def importing(app: str) -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except OperationError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        # The application's own line, rather than that of a library which it calls.
        own = [frame for frame in frames if not os.path.relpath(frame.filename).startswith("..")]
        where = (own or frames)[-1]
        place = "" if "importlib" in where.filename else f" ({os.path.relpath(where.filename)}, line {where.lineno})"
        raise OperationError(f"{app!r} can't be imported: {one_line(error)}{place}{_near(app, error)}") from None


def _near(app: str, error: BaseException) -> str:
    """The names that come near, where it is the application's module itself, or a package of it, that is not there."""
    module = app.partition(":")[0]
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is None or not f"{module}.".startswith(f"{missing}."):
        return ""
    package = missing.rpartition(".")[0]
    installed = (sys.prefix, sys.base_prefix)
    folders = sys.modules[package].__path__ if package else [one for one in sys.path if not one.startswith(installed)]
    known = [f"{package}.{found.name}".lstrip(".") for found in pkgutil.iter_modules(folders)]
    return did_you_mean(missing, known).removesuffix(".")


def extend_path(path: Iterable[str]) -> None:
    """Look for modules in these folders first."""
    for folder in reversed([os.path.abspath(one) for one in path]):  # noqa: PTH100 - as dramatiq has it
        if folder not in sys.path:
            sys.path.insert(0, folder)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence: ``; did you mean 'this'?`` if anything known comes near, else its full stop."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
