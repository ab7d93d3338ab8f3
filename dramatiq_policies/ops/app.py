"""Find an application, the broker and the actors by the names of the ``dramatiq`` command."""

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
from ..middleware.base import has_policies
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
    "suggest",
]


#: How many actors or queues an error lists.
_LISTED = 8


class PlaceholderBroker(StubBroker):
    """The broker for a module of jobs that sets no broker."""


def one_line(error: BaseException) -> str:
    """Return an error's class and text on one line, without credentials."""
    text = " ".join(str(error).split())
    return redact(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def load_broker(app: str, path: Iterable[str] = (".",), *, stand_in: bool = False) -> Broker:
    """Import an application and return its broker, with its middleware in order and every actor's options resolved.

    Parameters:
      app: ``package.module`` (the global broker counts), ``package.module:broker``, or ``package.module:factory``, which
        is called and sets the global broker.
      path: The folders to put before ``sys.path``. Default: the current folder.
      stand_in: Whether to set a StubBroker with dramatiq_policies if no broker is set, for a module of jobs alone.
        Default False: Dramatiq makes its own default broker.

    The application's own output during the import goes to stderr. Nothing connects unless the application does.

    Raises:
      OperationError: The application does not exist, or its import fails.
    """
    extend_path(path)
    if app == "django":
        with importing(app):
            found: Any = get_broker()
        return _with_middleware_in_order(app, found)
    if stand_in and dramatiq.broker.global_broker is None:
        set_broker(install(PlaceholderBroker()))
    found = import_object(app)
    if found is not None and not isinstance(found, Broker):
        if _is_actor(found):
            raise OperationError(f"{app!r} is an actor; name its module, {app.partition(':')[0]!r}.")
        if not callable(found):
            raise OperationError(f"{app!r} is neither a broker nor a callable that sets one.")
        with importing(app):
            found()
        found = None
    if found is None:
        with importing(app):
            found = get_broker()
    return _with_middleware_in_order(app, found)


def _with_middleware_in_order(app: str, broker: Broker) -> Broker:
    if has_policies(broker):
        with importing(app):
            order_middleware(broker)
    learn_passwords(broker, *broker.middleware)
    return broker


def require_actors(app: str, broker: Broker) -> None:
    """Refuse an application without actors.

    Raises:
      OperationError: No actor is declared on the broker.
    """
    if not broker.actors:
        raise OperationError(
            f"{app} declares no actors. Name the module that imports your actors, as for the dramatiq "
            "command. For a Django project pass --django."
            if app != "django"
            else "Django's installed apps declare no actors. Declare them in tasks.py of an app in "
            "INSTALLED_APPS, or name the module that imports them."
        )


def find_actor(target: str, path: Iterable[str] = (".",), *, stand_in: bool = False) -> Actor[..., Any]:
    """Return the actor that ``app:actor`` names: an attribute of the module, or an actor's name.

    Where a factory sets the broker, ``app:factory:actor``. ``path`` and ``stand_in`` as for `load_broker`.

    Raises:
      OperationError: There is no such actor; the text has the nearest names.
    """
    app, _, name = target.rpartition(":")
    if not app and os.environ.get("DJANGO_SETTINGS_MODULE") and dramatiq.broker.global_broker is not None:
        app = "django"  # Django is set up, and its settings' broker has the actors.
    if not app:
        raise OperationError(f"{target!r} names no actor; write it as app:actor.")
    broker = load_broker(app, path, stand_in=stand_in)
    if ":" not in app and app != "django":
        with contextlib.suppress(OperationError):
            found = import_object(target)
            actor = getattr(found, "__actor__", found)
            if _is_actor(found):
                return actor  # type: ignore[no-any-return]
    if name in broker.actors:
        return broker.actors[name]
    whose = "Django's broker" if app == "django" else app
    raise OperationError(f"{whose} has no actor {name!r}{suggest(name, broker.actors, 'its actors')}")


def _is_actor(value: object) -> bool:
    actor = getattr(value, "__actor__", value)
    return hasattr(actor, "send_with_options") and hasattr(actor, "broker")


def suggest(name: str, known: Iterable[str], what: str) -> str:
    """Return the end of a sentence: the nearest of the known names, else ``what`` and the first names."""
    names = sorted(known)
    suggestion = did_you_mean(name, names)
    if suggestion != "." or not names:
        return suggestion
    return f"; {what}: {', '.join(names[:_LISTED])}{', …' if len(names) > _LISTED else ''}."


def find_queue(broker: Broker, queue: str) -> str:
    """Return the name of a queue that the broker knows.

    Raises:
      OperationError: No actor uses the queue; the text has the nearest names.
    """
    known = known_queues(broker)
    if queue not in known:
        raise OperationError(f"No actor uses a queue {queue!r}{suggest(queue, known, 'the queues')}")
    return queue


def known_queues(broker: Broker) -> list[str]:
    """Return the declared queues without their delay queues, sorted by name."""
    return sorted({queue for queue in broker.get_declared_queues() if not queue.endswith((".DQ", ".XQ"))})


def import_object(path: str) -> Any:
    """Import ``module:attribute.attribute`` and return the object; None for a module alone.

    Raises:
      OperationError: The module or the attribute does not exist.
    """
    name, _, attributes = path.partition(":")
    if name.endswith(".py"):
        raise OperationError(
            f"{path!r} is a file; name the module, {os.path.normpath(name)[:-3].replace(os.sep, '.')!r}."
        )
    with importing(path):
        module = importlib.import_module(name)
    if not attributes:
        return None
    try:
        return functools.reduce(getattr, attributes.split("."), module)
    except AttributeError:
        public = [known for known in vars(module) if not known.startswith("_")]
        suggestion = did_you_mean(attributes, public)
        if suggestion == ".":
            actors = [known for known in public if _is_actor(vars(module)[known])]
            suggestion = suggest(attributes, actors, "its actors")
        raise OperationError(f"{name} has no {attributes!r}{suggestion}") from None


@contextlib.contextmanager
def importing(app: str) -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except OperationError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        # Name the application's own line, not the line of a library.
        own = [frame for frame in frames if not os.path.relpath(frame.filename).startswith("..")]
        where = (own or frames)[-1]
        place = "" if "importlib" in where.filename else f" ({os.path.relpath(where.filename)}, line {where.lineno})"
        raise OperationError(
            f"{app!r} can't be imported: {one_line(error)}{place}{_suggest_modules(app, error)}"
        ) from None


def _suggest_modules(app: str, error: BaseException) -> str:
    """Suggest names if the application's module itself, or a package of the module, is missing."""
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
    """Put folders before ``sys.path``."""
    for folder in reversed([os.path.abspath(one) for one in path]):  # noqa: PTH100 - as dramatiq has it
        if folder not in sys.path:
            sys.path.insert(0, folder)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence: ``; did you mean 'this'?`` if a known name is near, else a full stop."""
    nearest = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else "."
