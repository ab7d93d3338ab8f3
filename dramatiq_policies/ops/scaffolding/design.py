"""Read the design of a job: eight answers."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ...common.callables import accepts_call_of
from ...common.durations import WEEK_MS
from ...idempotency.keys import roots_of
from ..app import OperationError, did_you_mean, one_line

__all__ = ["Argument", "Design", "IncompleteDesign", "Named", "parse_design"]


class IncompleteDesign(OperationError):
    """A design has missing or invalid answers.

    Attributes:
      problems: A text for each question: ``job.purpose: its purpose, in one sentence``.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("The design is incomplete:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a job: the name, and the annotation or None."""

    name: str
    annotation: str | None

    def __str__(self) -> str:
        return self.name if self.annotation is None else f"{self.name}: {self.annotation}"


@dataclass(frozen=True, slots=True)
class Named:
    """An imported object: ``module:Name``."""

    module: str
    name: str
    value: Any

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The design of a job. The attributes are the answers in the TOML file."""

    purpose: str
    trigger: str
    arguments: tuple[Argument, ...]
    effect: str
    criticality: str
    queue: str
    timeout: int
    transient: tuple[Named, ...]
    permanent: tuple[Named, ...]
    configuration: tuple[Named, ...]
    idempotency_key: str | None = None
    idempotent: bool = False
    done_when: Named | None = None


_TEXTS = {
    "purpose": "the purpose, in one sentence",
    "trigger": "the code that sends the message, and when",
    "effect": "the change in the world afterwards",
    "criticality": "the damage if the job does not run: high, low, …",
    "queue": "the name of the queue: which jobs must it not wait behind?",
}
_ERRORS = {
    "transient": "transient errors, to be retried; [] if there are none",
    "permanent": "permanent errors, to be discarded; [] if there are none",
    "configuration": "errors that need a person, to alert on; [] if there are none",
}


_JOB = (*_TEXTS, "input", "timeout", "idempotency_key", "idempotent", "done_when")


def parse_design(data: Mapping[str, Any]) -> Design:
    """Read a design from the tables ``[job]`` and ``[errors]``.

    Raises:
      IncompleteDesign: Answers are missing or invalid; the text lists all of them.
      OperationError: A name in the file is no question.
    """
    problems: list[str] = []
    job: Any = data.get("job", {})
    errors: Any = data.get("errors", {})
    if not isinstance(job, Mapping) or not isinstance(errors, Mapping):
        raise IncompleteDesign(["expected the tables [job] and [errors]"])
    _refuse_unknown("", data, ("job", "errors"))
    _refuse_unknown("job.", job, _JOB)
    _refuse_unknown("errors.", errors, _ERRORS)
    texts: dict[str, Any] = {}
    for name, what in _TEXTS.items():
        value = job.get(name)
        texts[name] = value.strip() if isinstance(value, str) else ""
        if not texts[name]:
            problems.append(f"job.{name}: {what}")
    if texts["queue"] == "default":
        problems.append("job.queue: a queue other than 'default', where every job waits")
    arguments = _arguments(job.get("input"), problems)
    timeout = job.get("timeout")
    if type(timeout) is not int or not 0 < timeout <= WEEK_MS:
        problems.append("job.timeout: the milliseconds after which the job is stuck, and not only slow")
        timeout = 0
    named: dict[str, Any] = {
        name: tuple(_exceptions(name, errors.get(name), what, problems)) for name, what in _ERRORS.items()
    }
    seen: dict[Any, str] = {}
    problems += [
        f"errors.{name}: {one} is also in errors.{seen[one.value]}"
        for name, listed in named.items()
        for one in listed
        if seen.setdefault(one.value, name) != name
    ]
    idempotency = _idempotency(job, arguments, problems)
    if problems:
        raise IncompleteDesign(problems)
    return Design(arguments=arguments, timeout=timeout, **texts, **named, **idempotency)


def _refuse_unknown(table: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse misspelt names, whose answers would be ignored."""
    for name in given:
        if name not in known:
            there = ", ".join(f"{table}{one}" for one in known)
            raise OperationError(f"{table}{name} is unknown{did_you_mean(name, known)} Known names: {there}.")


def _arguments(given: object, problems: list[str]) -> tuple[Argument, ...]:
    what = 'the arguments, ids and plain values: ["order_id: int", …]; [] for no arguments'
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        problems.append(f"job.input: {what}")
        return ()
    try:
        (function,) = ast.parse(f"def job({', '.join(given)}): ...").body
        assert isinstance(function, ast.FunctionDef)
        args = function.args
        if args.vararg or args.kwarg or args.posonlyargs or args.kwonlyargs or args.defaults:
            raise SyntaxError("only names and types")
    except (SyntaxError, ValueError):
        problems.append(f"job.input: {what}, got {given!r}")
        return ()
    return tuple(
        Argument(one.arg, None if one.annotation is None else ast.unparse(one.annotation)) for one in args.args
    )


def _exceptions(name: str, given: object, what: str, problems: list[str]) -> Iterator[Named]:
    if not isinstance(given, list):
        problems.append(f"errors.{name}: {what}")
        return
    for path in given:
        found = _import(f"errors.{name}", path, problems)
        if found is None:
            continue
        if isinstance(found.value, type) and issubclass(found.value, BaseException):
            yield found
        else:
            problems.append(f"errors.{name}: {path!r} is not an exception class")


def _idempotency(job: Mapping[str, Any], arguments: tuple[Argument, ...], problems: list[str]) -> dict[str, Any]:
    key, idempotent, done_when = (job.get(name) for name in ("idempotency_key", "idempotent", "done_when"))
    if not key and not idempotent and not done_when:
        problems.append(
            'job.idempotency_key: a key that makes a second run harmless: "order:{order_id}"; or '
            "idempotent = true, or done_when"
        )
    if key is not None:
        names = {argument.name for argument in arguments}
        try:
            fields = set(roots_of(key))
        except (TypeError, ValueError):
            problems.append(f"job.idempotency_key: a template with fields from the arguments, got {key!r}")
        else:
            problems += [f"job.idempotency_key: {field!r} is not an argument" for field in sorted(fields - names)]
            if not fields and (arguments or not key):
                problems.append(
                    "job.idempotency_key: a template with fields from the arguments; without a field all "
                    "messages share one key"
                )
    if idempotent is not None and type(idempotent) is not bool:
        problems.append(f"job.idempotent: true or false, got {idempotent!r}")
    found = None
    if done_when is not None:
        found = _import("job.done_when", done_when, problems)
        if found is not None and not callable(found.value):
            problems.append(f"job.done_when: {done_when!r} is not callable")
        elif found is not None and not accepts_call_of(found.value, _signature_of(arguments)):
            takes = ", ".join(argument.name for argument in arguments)
            problems.append(f"job.done_when: {done_when!r} does not take the parameters of the job, ({takes})")
    return {"idempotency_key": key, "idempotent": bool(idempotent), "done_when": found}


def _signature_of(arguments: tuple[Argument, ...]) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(argument.name, kind) for argument in arguments])


def _import(where: str, path: object, problems: list[str]) -> Named | None:
    if not isinstance(path, str) or not path:
        problems.append(f'{where}: expected "module:Name", got {path!r}')
        return None
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module and hasattr(builtins, name):
        module = "builtins"
    try:
        return Named(module, name, functools.reduce(getattr, name.split("."), import_module(module)))
    except Exception as error:
        problems.append(f'{where}: {path!r} can\'t be imported as "module:Name" ({one_line(error)})')
        return None
