"""Sabotage the package, one small change at a time, and list the changes that survive the tests.

    python scripts/mutate.py --count 25 --seed 1                    # 25 mutants of each module, about ten minutes
    python scripts/mutate.py --count 1000 rules/rule rules/backoff  # all of two
    python scripts/mutate.py --only rules/rule:41:2                 # a survivor of the list again
    python scripts/mutate.py --verbose rules/rule                   # and which test noticed each

Works on copies of the checkout. Modules of one package are measured together: `transactions/scope transactions/relay` run
their tests once without a change. Each mutant is run by the tests of its lines, the quickest first, and counts as killed when
a test fails or hangs. Read each survivor: the change means the same, or a test is missing. Lines run only by processes of a
test count as run by no test.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import itertools
import json
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
from typing import Any, NamedTuple

# Imported here, and not again in each forked process: the imports take longer than most tests.
import dramatiq.brokers.redis  # noqa: F401
import hypothesis.strategies  # noqa: F401
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dramatiq_policies"
#: The tests of each module or of each module of a package, the quick ones first: files of `tests`, or folders.
TESTS = {
    "common/callables": [
        "common/test_callables",
        "rules",
        "middleware/test_error_classifier*",
        "idempotency/test_keys",
    ],
    "common/durations": ["common/test_durations", "rules/test_backoff"],
    "rules/retry_after": ["rules"],
    "rules/backoff": ["rules", "middleware/test_error_classifier*"],
    "rules/wait": ["rules", "middleware/test_error_classifier*"],
    "rules/rule": ["rules", "middleware/test_error_classifier*"],
    "rules/matching": ["rules", "middleware/test_error_classifier*"],
    "rules/parsing": ["rules", "middleware/test_error_classifier*"],
    "outcomes": ["delivery/test_outcomes", "middleware/test_discard_logger", "middleware/test_error_classifier*"],
    "delivery/outcome_publisher": ["delivery", "middleware/test_discard_logger"],
    "delivery/refusals": ["delivery"],
    "delivery/executor": ["delivery", "middleware/test_timeout", "idempotency/test_idempotency*"],
    "middleware/background_thread": ["middleware/test_background_thread"],
    "observability/outcome_log": ["middleware/test_error_classifier*"],
    "delivery/delivery": ["delivery", "middleware/test_error_classifier*", "middleware/test_timeout", "idempotency"],
    "delivery/decision": ["delivery", "middleware/test_error_classifier*", "idempotency"],
    "delivery/failed_run": ["kit/test_kit_stub", "middleware/test_error_classifier*", "idempotency"],
    "delivery/history": [
        "delivery/test_history",
        "kit/test_kit_stub",
        "middleware/test_error_classifier*",
        "idempotency",
    ],
    "delivery/limits": ["middleware/test_timeout", "middleware/test_error_classifier*"],
    "delivery/settlement": ["delivery", "middleware/test_error_classifier*", "idempotency"],
    "delivery/dead_letter": ["delivery", "middleware/test_error_classifier*", "integration/test_refusals"],
    "delivery/publishing": ["delivery", "middleware/test_error_classifier_publishing", "integration/test_refusals"],
    "brokers/redis": [
        "brokers",
        "integration/test_recovery",
        "integration/test_batches",
        "integration/test_browsers",
        "integration/test_data_loss",
    ],
    "brokers/stub": ["brokers", "kit/test_kit_stub", "kit/test_kit_drain", "delivery"],
    "brokers/rabbitmq": [
        "brokers",
        "integration/test_batches",
        "integration/test_browsers",
        "integration/test_consumers",
        "integration/test_delayed",
        "integration/test_ended",
        "integration/test_unreadable",
    ],
    "_redis": [
        "brokers/test_round_trips",
        "integration/test_batches",
        "integration/test_batched_completion",
        "integration/test_consumers",
        "integration/test_refusals",
        "integration/test_failover",
    ],
    "transactions": ["transactions", "sql", "kit/test_kit_transactions"],
    "sql": ["sql", "transactions", "kit/test_kit_transactions"],
    "contrib/django": ["contrib/django"],
    "ops/outbox": ["cli/test_outbox", "observability/test_outbox_monitor"],
    "idempotency": ["idempotency"],
    "idempotency/earlier": ["idempotency", "integration/test_stored_by_0_1_0", "integration/test_fingerprints"],
    "idempotency/fingerprint": ["idempotency/test_fingerprint", "idempotency/test_idempotency*"],
    "idempotency/batched_completion": ["idempotency", "integration/test_batched_completion"],
    "idempotency/claims": ["idempotency"],
    "idempotency/guard": ["idempotency"],
    "idempotency/keys": ["idempotency/test_keys", "idempotency"],
    "idempotency/options": ["idempotency"],
    "idempotency/actions": ["idempotency/test_actions", "project/test_fuzz", "idempotency"],
    "idempotency/records": ["idempotency/test_records", "project/test_fuzz", "idempotency"],
    "middleware/error_classifier": ["kit/test_kit_stub", "middleware/test_error_classifier*", "idempotency"],
    "middleware/idempotency": [
        "idempotency",
        "middleware/test_middleware_order",
        "integration/test_batched_completion",
    ],
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
#: A text with a meaning for the program: an option, a reason, a verb.
_NAME = re.compile("[a-z_]+")
_OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the replacements of a node."""
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
    """Return whether the node serves only type checkers or readers of logs."""
    text = ast.unparse(node) if isinstance(node, (ast.Expr, ast.Assign, ast.If)) else ""
    return text.startswith(("logger", "alerts", "__all__", "__slots__", "if TYPE_CHECKING"))


class Mutant(NamedTuple):
    source: str
    change: str
    #: The lines whose tests run the mutant; None if an import runs the mutant.
    lines: range | None


def places(
    node: ast.AST, lines: range | None = None, *, called: bool = False
) -> Iterator[tuple[ast.AST, str, int | None, range | None]]:
    """Yield every place of a node in a tree, without annotations: the parent, the field, the index.

    The last item has the lines of the statement without its body; None outside of functions.
    """
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or (
            isinstance(node, ast.JoinedStr) and field == "values"
        ):
            continue
        inside = called or (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and field == "body")
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not _uninteresting(child):
                its = _header(child) if inside and isinstance(child, (ast.stmt, ast.ExceptHandler)) else lines
                yield node, field, index, its
                yield from places(child, its, called=inside)


def _header(statement: Any) -> range:
    body = getattr(statement, "body", None)
    last = max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno
    return range(statement.lineno, last + 1)


def mutants(source: str) -> dict[str, Mutant]:
    """All, by line and number."""
    tree = ast.parse(source)
    found: dict[str, Mutant] = {}
    for parent, field, index, lines in list(places(tree)):
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
            change = f"{_shown(original)}  ->  {_shown(other)}"
            found[f"{line}:{number}"] = Mutant(ast.unparse(tree), change, lines)
            if index is None:
                setattr(parent, field, original)
            else:
                held[index] = original
    return found


def _shown(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0][:70]


class Watch:
    """A plugin of pytest: measure the time of each test, and record the lines of the modules run by each."""

    def __init__(self, modules: list[Path]) -> None:
        self.modules = modules
        self.seconds: dict[str, float] = {}
        import coverage

        # SQLAlchemy runs the statements of an async engine in greenlets.
        self.coverage = coverage.Coverage(
            data_file=None, include=list(map(str, modules)), concurrency=["thread", "greenlet"], config_file=False
        )
        self.coverage.start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        self.coverage.switch_context(_test_of(item.nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = _test_of(report.nodeid)
        self.seconds[test] = self.seconds.get(test, 0.0) + report.duration

    def write(self, path: Path) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {str(module): data.contexts_by_lineno(str(module)) for module in self.modules}
        path.write_text(json.dumps([self.seconds, lines]))


def _test_of(nodeid: str) -> str:
    # The ids of parameters may hold an address in memory.
    return nodeid.partition("[")[0]


class Run:
    """A run of some tests on a copy, in a process forked from the script, with all other modules already imported.

    Parameters:
      patience: Seconds until the run counts as hanging.
      watched: Modules whose lines are recorded by test. Compiled modules are then kept for later runs.
    """

    def __init__(self, copied: Path, tests: list[str], patience: float, *, watched: list[Path] | None = None) -> None:
        self.output = copied / "output.txt"
        self.notes = copied / "notes.json"
        self.hung = False
        self._status: int | None = None
        self._until = time.monotonic() + patience
        self._pid = os.fork()
        if self._pid == 0:
            self._child(copied, tests, watched)

    def _child(self, copied: Path, tests: list[str], watched: list[Path] | None) -> None:
        try:
            os.setsid()
            os.chdir(copied)
            output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.path.insert(0, str(copied))
            sys.dont_write_bytecode = watched is None
            os.environ |= {"PYTHONPATH": str(copied), "PYTHONDONTWRITEBYTECODE": "1" if watched is None else ""}
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
            options = ["-x", "-q", "--no-header", "--tb=no", "--hypothesis-seed=0"]
            for plugin in ("no:cacheprovider", "pytest_timeout", "_hypothesis_pytestplugin"):
                options += ["-p", plugin]
            watch = None if watched is None else Watch(watched)
            status = int(pytest.main([*options, *tests], plugins=[] if watch is None else [watch]))
            if watch is not None:
                watch.write(self.notes)
            os._exit(status)
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


def files_of(names: list[str]) -> list[str]:
    """Return the test files of a row of `TESTS`, without tests of ``django.tasks`` where Django is older than 6."""
    files: dict[str, None] = {}
    has_tasks = importlib.util.find_spec("django.tasks") is not None
    for name in names:
        found = sorted((ROOT / "tests").glob(f"{name}.py")) or sorted((ROOT / "tests" / name).glob("test_*.py"))
        if not found:
            raise SystemExit(f"there are no tests of the name {name}")
        # pytest collects a named file, even a file in `collect_ignore`.
        applicable = (path for path in found if has_tasks or not path.name.startswith("test_tasks"))
        files.update((str(path.relative_to(ROOT)), None) for path in applicable)
    return list(files)


class Tests:
    """The tests of some modules, all passing without a change, and the lines run by each test."""

    def __init__(self, copied: Path, modules: list[str], names: list[str]) -> None:
        paths = {module: copied / file_of(module) for module in modules}
        run = Run(copied, files_of(names), 1_800, watched=list(paths.values()))
        if not run.passes():
            raise SystemExit(f"{', '.join(modules)}: tests fail without any change: {run.noticed_by()}")
        self._seconds, lines = json.loads(run.notes.read_text())
        self._lines = {module: lines[str(path)] for module, path in paths.items()}
        for path in paths.values():
            # Python would not notice a change of the same length within the same second.
            for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
                compiled.unlink()
            path.write_text(ast.unparse(ast.parse(path.read_text())))
        run = Run(copied, *self.of(modules[0], None))
        if not run.passes():
            raise SystemExit(f"{', '.join(modules)}: tests fail when the quickest come first: {run.noticed_by()}")

    def of(self, module: str, lines: range | None) -> tuple[list[str], float]:
        """Return the tests of the lines, the quickest first, and the seconds until these tests count as hanging."""
        if lines is None:
            tests = set(self._seconds)
        else:
            tests = {test for line in lines for test in self._lines[module].get(str(line), ()) if test}
        return sorted(tests, key=self._seconds.__getitem__), 5 * sum(self._seconds[test] for test in tests) + 60


def file_of(module: str) -> Path:
    return Path(PACKAGE, f"{module}.py")


def row_of(module: str) -> list[str]:
    """Return the row of a module in `TESTS`, or else of its package."""
    return TESTS.get(module) or TESTS[module.rpartition("/")[0]]


def modules_of(name: str) -> list[str]:
    """Return the module of the name, or the modules of a package in `TESTS` without a row for the module alone."""
    spec = importlib.util.find_spec(PACKAGE)  # Not an import: the mutants' processes import their own copy.
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / name
    if not folder.is_dir():
        return [name]
    found = (f"{name}/{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__")
    return [module for module in found if module not in TESTS]


def measured(modules: list[str], scratch: Path, options: argparse.Namespace) -> tuple[Tests, list[Path]]:
    """Return the common tests of the modules, and the copies of the checkout to sabotage."""
    copies = [scratch / modules[0] / str(number) for number in range(options.jobs)]
    shutil.copytree(ROOT, copies[0], ignore=shutil.ignore_patterns(".*", "build", "dist", "__pycache__"))
    tests = Tests(copies[0], modules, row_of(modules[0]))
    for copied in copies[1:]:
        shutil.copytree(copies[0], copied)
    return tests, copies


def sabotage(module: str, tests: Tests, copies: list[Path], options: argparse.Namespace) -> None:
    """Try a module's mutants, one at a time on each copy of the checkout."""
    inside = file_of(module)
    unchanged = (copies[0] / inside).read_text()
    every = mutants((ROOT / inside).read_text())
    names = random.Random(options.seed).sample(sorted(every), min(options.count, len(every)))
    if options.only:
        names = [options.only.split(":", 1)[1]]
    unseen = [name for name in names if not tests.of(module, every[name].lines)[0]]
    for name in unseen:
        print(f"  {module}:{name}  {every[name].change}  survived: no test runs it", flush=True)
    tried = survived = len(unseen)
    hung = 0
    waiting: Iterator[str] = iter([name for name in names if name not in unseen])
    running: dict[Path, tuple[str, Run]] = {}
    try:
        while True:
            for copied in copies:
                if copied not in running and _cpu() < options.cpu and (name := next(waiting, None)):
                    (copied / inside).write_text(every[name].source)
                    running[copied] = name, Run(copied, *tests.of(module, every[name].lines))
            if not running:
                break
            time.sleep(0.01)
            for copied, (name, run) in list(running.items()):
                if run.is_over():
                    del running[copied]
                    tried, survived, hung = tried + 1, survived + run.passes(), hung + run.hung
                    if run.passes() or options.verbose:
                        end = "survived" if run.passes() else f"killed by {run.noticed_by()}"
                        print(f"  {module}:{name}  {every[name].change}  {end}", flush=True)
    finally:
        for _, run in running.values():
            run.kill()
        for copied in copies:
            (copied / inside).write_text(unchanged)
    print(f"{module}: {tried} of {len(every)} mutants tried, {survived} survived, {hung} hung", flush=True)


def _cpu() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"or packages, of {', '.join(TESTS)}; default all")
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
        modules = sorted((module for name in chosen for module in modules_of(name)), key=row_of)
        for _, alike in itertools.groupby(modules, row_of):
            together = list(alike)
            tests, copies = measured(together, Path(scratch), options)
            for module in together:
                sabotage(module, tests, copies, options)
    print(f"{_cpu():.0f} s of CPU")


if __name__ == "__main__":
    main()
