"""Find faults of pipelines and groups in the source of an application's modules."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dramatiq.middleware import GroupCallbacks
from dramatiq.results import Results

from ...delivery.broker_state import state_of

if TYPE_CHECKING:
    from dramatiq import Actor
    from dramatiq.broker import Broker

__all__ = ["check_composition"]

#: The actor's name or None, the code, and the text of each finding.
Found = Iterator[tuple[str | None, str, str]]

_SENDS = frozenset({"send", "send_with_options", "message", "message_with_options", "run"})
_READS = frozenset({"get_result", "get_results"})


def check_composition(broker: Broker) -> Found:
    """Find pipelines with unprotected later steps, and groups or results without their middleware.

    Reads the source of each loaded module in the top-level packages of the actors. The check can't see a pipeline that
    a function assembles from variables.
    """
    has_callbacks = any(isinstance(middleware, GroupCallbacks) for middleware in broker.middleware)
    has_results = any(isinstance(middleware, Results) for middleware in broker.middleware)
    for module in _modules_of(broker):
        tree = _parsed(module)
        if tree is None:
            continue
        assigned = _assignments(tree)
        # ast.walk() comes to `a | b | c` before the `a | b` in it.
        inner: set[ast.AST] = set()
        for node in ast.walk(tree):
            place = f"{module.__name__}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name, receiver = node.func.attr, node.func.value
                if name == "add_completion_callback" and not has_callbacks:
                    yield (
                        None,
                        "DP028",
                        f"{place}: a group has a completion callback, and the broker has no GroupCallbacks",
                    )
                elif name in _READS and not has_results and _is_of_messages(receiver, assigned):
                    yield None, "DP029", f"{place}: {name}() is called, and the broker has no Results"
            if isinstance(node, ast.BinOp):
                inner.add(node.left)
                if node in inner:
                    continue
            for actor in _unkeyed_steps(_steps_of(node, assigned, module, broker)):
                text = f"{place}: a step of a pipeline has no idempotency_key, the first step has one"
                yield actor.actor_name, "DP030", f"{text}; if the pipeline is sent twice, this step runs twice"


def _modules_of(broker: Broker) -> list[ModuleType]:
    tops = {actor.fn.__module__.partition(".")[0] for actor in broker.actors.values() if actor.fn.__module__}
    loaded = sorted(sys.modules.items())
    return [module for name, module in loaded if name.partition(".")[0] in tops - {"dramatiq", "dramatiq_policies"}]


def _parsed(module: ModuleType) -> ast.Module | None:
    try:
        source = inspect.getsource(module)
        # Most modules compose nothing; parsing is the slow part.
        if not any(word in source for word in (".message", "add_completion_callback", *_READS)):
            return None
        return ast.parse(source)
    except (OSError, TypeError, SyntaxError, ValueError):
        return None


def _assignments(tree: ast.Module) -> dict[str, ast.expr | None]:
    """Map each variable to the expression assigned to it; None for a variable with several assignments."""
    found: dict[str, ast.expr | None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            found[name] = None if name in found else node.value
    return found


def _is_of_messages(node: ast.AST, assigned: dict[str, ast.expr | None]) -> bool:
    """Whether an expression is a message, a group or a pipeline."""
    if isinstance(node, ast.Name):
        value = assigned.get(node.id)
        return value is not None and not isinstance(value, ast.Name) and _is_of_messages(value, {})
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            name = _last_name(part.func)
            if name in ("group", "pipeline") or (name in _SENDS and isinstance(part.func, ast.Attribute)):
                return True
    return False


def _last_name(node: ast.AST) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def _steps_of(
    node: ast.AST, assigned: dict[str, ast.expr | None], module: ModuleType, broker: Broker
) -> list[Actor[..., Any]]:
    """Return the actors of a pipeline in order, as far as the source names them; [] for any other node."""
    parts: list[ast.expr] = []
    if isinstance(node, ast.Call) and _last_name(node.func) == "pipeline" and node.args:
        listed: ast.expr | None = node.args[0]
        if isinstance(listed, ast.Name):
            listed = assigned.get(listed.id)
        parts = list(listed.elts) if isinstance(listed, (ast.List, ast.Tuple)) else []
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        parts = list(_operands(node))
    actors = [_actor_of(part, module, broker) for part in parts]
    return [actor for actor in actors if actor is not None]


def _operands(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _operands(node.left)
        yield from _operands(node.right)
    else:
        yield node


def _actor_of(node: ast.expr, module: ModuleType, broker: Broker) -> Actor[..., Any] | None:
    """Return the actor of ``actor.message(…)``."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    names, target = [], node.func.value
    while isinstance(target, ast.Attribute):
        names.append(target.attr)
        target = target.value
    if node.func.attr not in ("message", "message_with_options") or not isinstance(target, ast.Name):
        return None
    found: Any = vars(module).get(target.id)
    for name in reversed(names):
        found = getattr(found, name, None)
    found = getattr(found, "__actor__", found)
    return found if found is not None and found in broker.actors.values() else None


def _unkeyed_steps(steps: list[Actor[..., Any]]) -> list[Actor[..., Any]]:
    """Return the unprotected later steps of a pipeline if its first step has a key."""
    if len(steps) < 2 or not _has_key(steps[0]):
        return []
    unkeyed = (step for step in steps[1:] if not _has_key(step) and step.options.get("done_when") is None)
    return list(dict.fromkeys(unkeyed))


def _has_key(actor: Actor[..., Any]) -> bool:
    # idempotent=True is not enough: a second pipeline has other message ids.
    policy = state_of(actor.broker).policies.get(actor.actor_name)
    return policy is not None and policy.idempotency is not None and policy.idempotency.key_of is not None
