"""Sabotage the package, one small change at a time, and see whether its tests notice: which changes survive them.

    python scripts/mutate.py --count 25 --seed 1               # 25 mutants of each module, about ten minutes
    python scripts/mutate.py --count 1000 rules backoff        # all of two
    python scripts/mutate.py --only rules:41:2                 # one again, as the list of survivors names it
    python scripts/mutate.py --verbose rules                   # and which test noticed each

Works on copies of the checkout. A mutant counts as killed when a test fails or hangs. What survives is either a change
that means the same, or a test that is missing: read each.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Imported once here, by no process that is forked: they take longer than most tests.
import dramatiq.brokers.redis  # noqa: F401
import hypothesis.strategies  # noqa: F401
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dramatiq_policies"
#: The tests of each module, the quick ones first.
TESTS = {
    "retry_after_header": ["test_backoff"],
    "backoff": ["test_backoff", "test_error_classifier"],
    "callables": ["test_backoff", "test_rules", "test_error_classifier", "test_keys"],
    "durations": ["test_durations", "test_backoff"],
    "rules": ["test_rules", "test_error_classifier"],
    "rule_set": ["test_rules", "test_error_classifier"],
    "declarations": ["test_rules", "test_error_classifier"],
    "outcomes": ["test_outcomes", "test_discard_logger", "test_error_classifier"],
    "history": ["test_records", "test_kit_stub", "test_error_classifier", "test_quarantine"],
    "decisions": ["test_kit_stub", "test_error_classifier", "test_idempotency"],
    "middleware/error_classifier": ["test_kit_stub", "test_error_classifier", "test_idempotency"],
    "limits": ["test_timeout", "test_error_classifier"],
    "records": ["test_records", "test_fuzz", "test_claims", "test_claims_model", "test_idempotency"],
    "claims": ["test_claims", "test_claims_model", "test_quarantine", "test_idempotency"],
    "keys": ["test_keys", "test_idempotency"],
    "guards": ["test_keys", "test_idempotency", "test_quarantine"],
    "admission": ["test_quarantine", "test_idempotency"],
    "piggyback": ["integration/test_piggyback"],
    "middleware/idempotency": ["test_keys", "test_idempotency", "test_quarantine", "test_middleware_order"],
}
_COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
}
_DELETED = (ast.Assign, ast.AugAssign, ast.Delete, ast.Raise, ast.Continue, ast.Break)
#: A text that means something to the program: an option, a reason, a verb.
_NAME = re.compile("[a-z_]+")
_OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    if isinstance(node, ast.Constant):
        yield from _other_constants(node)
    elif isinstance(node, ast.expr):
        yield from _other_expressions(node)
    elif isinstance(node, ast.If):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        yield ast.If(ast.Constant(False), node.body, node.orelse)
    elif isinstance(node, ast.While):
        yield ast.While(ast.Constant(False), node.body, node.orelse)
    elif isinstance(node, ast.ExceptHandler):
        caught: list[Any] = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        for others in _without_one(caught):
            yield ast.ExceptHandler(ast.Tuple(others, ast.Load()), node.name, node.body)
    elif isinstance(node, ast.Return) and not (node.value is None or _is_plain(node.value)):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, _DELETED) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()


def _other_constants(node: ast.Constant) -> Iterator[ast.Constant]:
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node.value, str) and _NAME.fullmatch(node.value):
        yield ast.Constant(f"{node.value}_")


def _other_expressions(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            other = _COMPARISONS[type(op)]()
            yield ast.Compare(node.left, [*node.ops[:index], other, *node.ops[index + 1 :]], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
        for others in _without_one(node.values):
            yield ast.BoolOp(node.op, others) if len(others) > 1 else others[0]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        yield ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _OPPOSITES:
        yield ast.Call(ast.Name(_OPPOSITES[node.func.id], ast.Load()), node.args, node.keywords)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        for index, one in enumerate(node.generators):
            if one.ifs:
                changed = copy.copy(node)
                unconditional = ast.comprehension(one.target, one.iter, [], one.is_async)
                changed.generators = [*node.generators[:index], unconditional, *node.generators[index + 1 :]]
                yield changed


def _without_one(values: list[ast.expr]) -> Iterator[list[ast.expr]]:
    for index in range(len(values)):
        yield [*values[:index], *values[index + 1 :]]


def _is_plain(node: ast.expr) -> bool:
    """None, or what is changed by itself."""
    return isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool))


def _uninteresting(node: ast.AST) -> bool:
    """What runs for type checkers or for readers of logs only."""
    text = ast.unparse(node) if isinstance(node, (ast.Expr, ast.Assign, ast.If)) else ""
    return text.startswith(("logger", "alerts", "__all__", "__slots__", "if TYPE_CHECKING"))


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every place in a tree where a node stands, but for annotations: its parent, the field, its index there."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or (
            isinstance(node, ast.JoinedStr) and field == "values"
        ):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not _uninteresting(child):
                yield node, field, index
                yield from places(child)


def mutants(source: str) -> dict[str, tuple[str, str]]:
    """By line and number each mutant's source, and what it changes."""
    tree = ast.parse(source)
    found: dict[str, tuple[str, str]] = {}
    for parent, field, index in list(places(tree)):
        held = getattr(parent, field)
        original = held if index is None else held[index]
        for other in changes(original):
            changed = copy.copy(other)
            if index is None:
                setattr(parent, field, changed)
            else:
                held[index] = changed
            ast.fix_missing_locations(tree)
            line = original.lineno
            number = sum(1 for name in found if name.startswith(f"{line}:"))
            found[f"{line}:{number}"] = (ast.unparse(tree), f"{_shown(original)}  ->  {_shown(other)}")
            if index is None:
                setattr(parent, field, original)
            else:
                held[index] = original
    return found


def _shown(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0][:70]


class Run:
    """A run of some tests on a copy, in a process that was forked from this one: what does not change is imported already.

    Parameters:
      patience: After how many seconds it hangs.
      keeps: Whether compiled modules are kept for later runs.
    """

    def __init__(self, copied: Path, tests: list[str], patience: float, *, keeps: bool = False) -> None:
        self.output = copied / "output.txt"
        self.hung = False
        self._status: int | None = None
        self._until = time.monotonic() + patience
        self._pid = os.fork()
        if self._pid == 0:
            self._child(copied, tests, keeps)

    def _child(self, copied: Path, tests: list[str], keeps: bool) -> None:
        try:
            os.setsid()
            os.chdir(copied)
            output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.path.insert(0, str(copied))
            sys.dont_write_bytecode = not keeps
            os.environ |= {"PYTHONPATH": str(copied), "PYTHONDONTWRITEBYTECODE": "" if keeps else "1"}
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
            options = ["-x", "-q", "--no-header", "--tb=no", "--hypothesis-seed=0"]
            for plugin in ("no:cacheprovider", "pytest_timeout", "_hypothesis_pytestplugin"):
                options += ["-p", plugin]
            os._exit(int(pytest.main([*options, *(f"tests/{name}.py" for name in tests)])))
        finally:
            os._exit(1)

    def is_over(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._status = status
                self.kill()
            elif time.monotonic() > self._until:
                self.hung = True
                self.kill()
                _, self._status = os.waitpid(self._pid, 0)
        return self._status is not None

    def kill(self) -> None:
        try:
            os.killpg(self._pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def passes(self) -> bool:
        """Whether all tests pass; waits for them."""
        while not self.is_over():
            time.sleep(0.01)
        return self._status == 0

    def noticed_by(self) -> str:
        lines = self.output.read_text(errors="replace").splitlines()
        named = (line for line in lines if line.startswith(("FAILED", "ERROR")))
        return "hung" if self.hung else next(named, "did not run")[:150]


def sabotage(module: str, copies: list[Path], options: argparse.Namespace) -> bool:
    """Try a module's mutants, one at a time on each copy; False if there is no telling."""
    inside = Path(PACKAGE, f"{module}.py")
    source = (copies[0] / inside).read_text()
    every = mutants(source)
    names = random.Random(options.seed).sample(sorted(every), min(options.count, len(every)))
    if options.only:
        names = [options.only.split(":", 1)[1]]
    patience = _unchanged(inside, copies, TESTS[module])
    if patience is None:
        return False
    tried = survived = hung = 0
    waiting: Iterator[str] = iter(names)
    running: dict[Path, tuple[str, Run]] = {}
    try:
        while True:
            for copied in copies:
                if copied not in running and _cpu() < options.cpu and (name := next(waiting, None)):
                    (copied / inside).write_text(every[name][0])
                    running[copied] = name, Run(copied, TESTS[module], patience)
            if not running:
                break
            time.sleep(0.01)
            for copied, (name, run) in list(running.items()):
                if run.is_over():
                    del running[copied]
                    tried, survived, hung = tried + 1, survived + run.passes(), hung + run.hung
                    if run.passes() or options.verbose:
                        end = "survived" if run.passes() else f"killed by {run.noticed_by()}"
                        print(f"  {module}:{name}  {every[name][1]}  {end}", flush=True)
    finally:
        for _, run in running.values():
            run.kill()
    for copied in copies:
        (copied / inside).write_text(source)
    print(f"{module}: {tried} of {len(every)} mutants tried, {survived} survived, {hung} hung", flush=True)
    return True


def _unchanged(inside: Path, copies: list[Path], tests: list[str]) -> float | None:
    """After how many seconds tests hang; None, and that is said, if they fail on what is no mutant."""
    began = time.monotonic()
    for copied in copies:
        (copied / inside).write_text(ast.unparse(ast.parse((copied / inside).read_text())))
    runs = [Run(copied, tests, 600, keeps=True) for copied in copies]
    failed = [run for run in runs if not run.passes()]
    if failed:
        print(f"{inside}: its tests fail without any change: {failed[0].noticed_by()}")
        return None
    for copied in copies:
        # A change of the same length within the same second would not be seen.
        for compiled in (copied / inside).parent.glob(f"__pycache__/{inside.stem}.*"):
            compiled.unlink()
    return 3 * (time.monotonic() - began) + 20


def _cpu() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TESTS)}; default all")
    parser.add_argument("--count", type=int, default=25, help="mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="how many at the same time")
    parser.add_argument("--cpu", type=float, default=720.0, help="seconds of CPU after which no further one is begun")
    parser.add_argument("--only", help="one mutant: module:line:number")
    parser.add_argument("--verbose", action="store_true", help="also what was noticed, and by which test")
    options = parser.parse_args()
    chosen = options.modules or list(TESTS)
    if options.only:
        chosen = [options.only.split(":", 1)[0]]
    with tempfile.TemporaryDirectory() as scratch:
        copies = [Path(scratch, str(number)) for number in range(options.jobs)]
        for copied in copies:
            shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".*", "build", "dist", "__pycache__"))
        if not all(sabotage(module, copies, options) for module in chosen):
            return 1
        print(f"{_cpu():.0f} s of CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
