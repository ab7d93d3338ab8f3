"""Sabotage the package, one small change at a time, and see whether its tests notice: which changes survive them.

    python scripts/mutate.py --count 25 --seed 1               # 25 mutants of each module, about ten minutes
    python scripts/mutate.py --count 1000 rules backoff        # all of two
    python scripts/mutate.py --only rules:41:2                 # one again, as the list of survivors names it

Works on a copy of the checkout. A mutant counts as killed when a test fails or hangs. What survives is either a change
that means the same, or a test that is missing: read each.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dramatiq_policies"
#: The tests of each module, the quick ones first.
TESTS = {
    "rules": ["test_rules", "test_error_classifier"],
    "rule_set": ["test_rules", "test_error_classifier"],
    "declarations": ["test_rules", "test_error_classifier"],
    "backoff": ["test_backoff", "test_error_classifier"],
    "asked": ["test_backoff"],
    "decisions": ["test_error_classifier", "test_kit_stub", "test_idempotency"],
    "middleware/error_classifier": ["test_error_classifier", "test_kit_stub", "test_idempotency"],
    "records": ["test_records", "test_fuzz", "test_claims", "test_claims_model", "test_idempotency"],
    "claims": ["test_claims", "test_claims_model", "test_quarantine", "test_idempotency"],
    "guards": ["test_idempotency", "test_quarantine"],
    "admission": ["test_quarantine", "test_idempotency"],
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
_OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        yield ast.Compare(node.left, [_COMPARISONS[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
        yield node.values[0]
        yield node.values[-1]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        yield ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _OPPOSITES:
        yield ast.Call(ast.Name(_OPPOSITES[node.func.id], ast.Load()), node.args, node.keywords)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.If):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        yield ast.If(ast.Constant(False), node.body, node.orelse)
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, (ast.Assign, ast.AugAssign)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield ast.Pass()


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _uninteresting(node: ast.AST) -> bool:
    """What runs for type checkers or for readers of logs only."""
    text = ast.unparse(node) if isinstance(node, (ast.Expr, ast.Assign, ast.If)) else ""
    return text.startswith(("logger", "alerts", "__all__", "if TYPE_CHECKING"))


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every place in a tree where a node stands, but for annotations: its parent, the field, its index there."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
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


def survives(copied: Path, tests: list[str], patience: float) -> bool:
    """Whether all tests pass on the copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--hypothesis-seed=0"]
    command += ["-p", "no:cacheprovider", *(f"tests/{name}.py" for name in tests)]
    environment = {**os.environ, "PYTHONPATH": str(copied), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=copied, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        return process.wait(patience) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TESTS)}; default all")
    parser.add_argument("--count", type=int, default=25, help="mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cpu", type=float, default=720.0, help="seconds of CPU after which no further one is begun")
    parser.add_argument("--only", help="one mutant: module:line:number")
    options = parser.parse_args()
    chosen = options.modules or list(TESTS)
    if options.only:
        chosen = [options.only.split(":", 1)[0]]
    with tempfile.TemporaryDirectory() as scratch:
        copied = Path(scratch, "checkout")
        shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".*", "build", "dist", "__pycache__"))
        for module in chosen:
            path = copied / PACKAGE / f"{module}.py"
            source = path.read_text()
            began = time.monotonic()
            path.write_text(ast.unparse(ast.parse(source)))
            if not survives(copied, TESTS[module], 600):
                print(f"{module}: its tests fail without any change")
                return 1
            patience = 2 * (time.monotonic() - began) + 20
            every = mutants(source)
            names = random.Random(options.seed).sample(sorted(every), min(options.count, len(every)))
            if options.only:
                names = [options.only.split(":", 1)[1]]
            survivors, tried = [], 0
            for name in names:
                spent = resource.getrusage(resource.RUSAGE_CHILDREN)
                if spent.ru_utime + spent.ru_stime > options.cpu:
                    break
                tried += 1
                path.write_text(every[name][0])
                if survives(copied, TESTS[module], patience):
                    survivors.append(name)
                    print(f"  survived  {module}:{name}  {every[name][1]}", flush=True)
            path.write_text(source)
            print(f"{module}: {tried} of {len(every)} mutants tried, {len(survivors)} survived", flush=True)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{spent.ru_utime + spent.ru_stime:.0f} s of CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
