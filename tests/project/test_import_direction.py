"""Imports point one way, and nothing optional is needed to import the package."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dramatiq_policies

PACKAGE = Path(dramatiq_policies.__file__).parent
#: From the ground up; a module may import those of its own line and below.
LAYERS = [
    {"credentials", "texts"},
    {"safe_logger"},
    {"_dramatiq", "broker_kinds", "clock", "durations", "forks", "notes", "round_trips", "struck", "timer"},
    {"errors"},
    {"user_errors", "private_files"},
    {"callables", "retry_after_header", "slots"},
    {"_udp", "_datadog"},
    {"statsd"},
    {"backoff"},
    {"rules"},
    {"declarations", "rule_set"},
    {"verdicts"},
    {"outcomes"},
    {"refusals"},
    {"history", "delivery", "shape", "options", "delay_queue"},
    {"wiring"},
    {"callbacks", "results", "handing_off"},
    {"decision", "decisions", "limits", "queues", "election"},
    {"queue_alerts"},
    {"moving"},
    {"consumer"},
    {"brokers", "records"},
    {"interrupts", "coroutines", "greenlets", "logs", "_sentry_sdk"},
    {"stores", "owners", "keys", "solitude", "store_calls"},
    {"leases", "earlier", "services", "crowds"},
    {"claims", "guards"},
    {"admission", "piggyback"},
    {"middleware", "running"},
    {"contrib"},
    {"bundle", "_typed_actor"},
    {"ops", "testing"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The modules of the package that are imported when this one is: not for type checking, not inside functions."""
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level < depth:
                found.add(layer_of(path))
            elif node.module:
                found.add(node.module.split(".")[0])
            else:
                found.update(alias.name for alias in node.names)
    return found


def test_each_module_imports_only_from_its_own_layer_or_below():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
        for name in imports_of(path)
        if LEVEL[name] > LEVEL[layer_of(path)]
    ]
    assert wrong == []


def test_the_page_on_the_design_names_modules_that_exist_in_this_order():
    page = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
    table, _, order = page.partition("## Import direction")
    named = set(re.findall(r"[\w/]+\.(?:py|lua)\b|(?<=`)[\w/]+/(?=`)", table))
    assert len(named) > 30
    scripts = {path.name for path in PACKAGE.rglob("*.lua")}
    assert {name for name in named - scripts if not (PACKAGE / name).exists()} == set()
    groups = [re.findall(r"\w+", group) for group in order.partition(". A test")[0].split("<-")]
    levels = [[LEVEL[name] for name in group] for group in groups]
    assert all(max(lower) < min(upper) for lower, upper in itertools.pairwise(levels))


def test_rules_and_backoff_know_nothing_of_dramatiq():
    for name in ("rules", "rule_set", "declarations", "backoff", "retry_after_header", "durations"):
        assert "dramatiq" not in {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {
            (node.module or "").split(".")[0]
            for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text()))
            if isinstance(node, ast.ImportFrom) and not node.level
        }


def test_importing_the_package_needs_nothing_but_dramatiq():
    code = (
        "import sys\n"
        "for name in ('redis', 'pika', 'statsd', 'sentry_sdk', 'gevent', 'click', 'rich'): sys.modules[name] = None\n"
        "import dramatiq_policies, dramatiq_policies.ops\n"
        "from dramatiq.brokers.stub import StubBroker\n"
        "dramatiq_policies.install(StubBroker())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LATER = """
import sys
import dramatiq
from dramatiq.brokers.stub import StubBroker
import dramatiq_policies

assert set(dramatiq_policies.__all__) <= set(dir(dramatiq_policies))
broker = dramatiq_policies.install(StubBroker())
dramatiq.actor(lambda: None, actor_name="pay", broker=broker, retry_on=OSError)
ours = {"statsd", "_udp", "_sentry_sdk", "queues", "queue_alerts", "election"} | {
    f"middleware.{name}" for name in ("heartbeat", "metrics", "queue_monitor", "sentry")
}
print(sorted(name for name in ours if f"dramatiq_policies.{name}" in sys.modules))

from dramatiq_policies import *
assert all(value.__module__.startswith("dramatiq") for value in (Heartbeat, Metrics, QueueMonitor, SentryReporter))
assert Threshold is dramatiq_policies.middleware.queue_monitor.Threshold is dramatiq_policies.Threshold
assert vars(dramatiq_policies)["Threshold"] is Threshold
"""


def test_what_a_broker_has_not_is_not_imported_and_yet_a_name_like_any_other():
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_name_that_is_not_there_is_answered_as_by_any_module():
    with pytest.raises(AttributeError, match=r"^module 'dramatiq_policies' has no attribute 'Metric'$"):
        dramatiq_policies.Metric  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Metric' from 'dramatiq_policies'"):
        from dramatiq_policies import Metric  # noqa: F401


def test_all_public_names_exist():
    assert len(set(dramatiq_policies.__all__)) == len(dramatiq_policies.__all__)
    for name in dramatiq_policies.__all__:
        assert hasattr(dramatiq_policies, name)


def test_private_names_of_dramatiq_stand_in_one_module():
    offenders = [
        f"{path.name}: {alias.name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "_dramatiq.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dramatiq") and not node.level
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert offenders == []
