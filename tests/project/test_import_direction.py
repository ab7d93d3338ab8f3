"""Imports point one way, and nothing optional is needed to import the package."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dramatiq_policies

PACKAGE = Path(dramatiq_policies.__file__).parent
#: From the bottom up: a package or a module of the root imports only from earlier lines, and from the same package.
LAYERS = [
    {"common"},
    {"errors"},
    {"_job_errors"},
    {"_dramatiq", "_redis", "outcomes", "rules"},
    {"interrupts", "stores"},
    {"delivery"},
    {"idempotency"},
    {"brokers"},
    {"observability"},
    {"middleware"},
    {"transactions"},
    {"bundle", "_typed_actor", "sql"},
    {"ops"},
    {"contrib", "testing"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of the package that a module imports: at once, inside of functions, and for type checkers."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                name = ".".join([*parts, alias.name])
                found.add(name if name in MODULES else ".".join(parts))
    return frozenset(found - {module, ""})


def package_of(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def test_each_package_imports_only_from_below():
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if module
        for name in sorted(imports_of(module))
        if package_of(name) != package_of(module) and LEVEL[package_of(name)] >= LEVEL[package_of(module)]
    ]
    assert wrong == []


def circles() -> list[set[str]]:
    """Return sets of modules in a circle: each imports each other, perhaps indirectly."""
    reached = {module: set(imports_of(module)) for module in MODULES if module}
    for middle, behind in reached.items():
        for found in reached.values():
            if middle in found:
                found.update(behind)
    return [
        {other for other in found if module in reached[other]} for module, found in reached.items() if module in found
    ]


def test_no_module_imports_itself_by_way_of_others():
    assert circles() == []


def test_the_root_holds_only_the_vocabulary_and_install():
    assert len([module for module, path in MODULES.items() if path.parent == PACKAGE]) <= 12


def test_each_package_states_its_purpose():
    packages = [path for path in MODULES.values() if path.name == "__init__.py"]
    assert [str(path) for path in packages if not ast.get_docstring(ast.parse(path.read_text()))] == []


#: Found by Django by name, and imported by no module.
FOUND_BY_DJANGO = {"contrib.django.management", "contrib.django.management.commands", "contrib.django.migrations"}
#: Public modules that `import *` must not import: `stores.redis` needs an extra.
IMPORTED_BY_NAME = {"stores": {"memory", "redis"}}
PACKAGES = {module for module, path in MODULES.items() if module and path.name == "__init__.py"}


def face_of(package: str) -> set[str]:
    """Return the names in a package's ``__all__``: its own, and modules imported by other packages."""
    for node in ast.parse(MODULES[package].read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value)) | IMPORTED_BY_NAME.get(package, set())
    raise AssertionError(f"{package} has no __all__")


@pytest.mark.parametrize("package", sorted(PACKAGES - FOUND_BY_DJANGO))
def test_other_packages_import_only_a_package_s_face(package):
    imported = {
        name.removeprefix(f"{package}.").partition(".")[0]
        for module in MODULES
        if module and not f"{module}.".startswith(f"{package}.")
        for name in imports_of(module)
        if name.startswith(f"{package}.")
    }
    inner = {name.removeprefix(f"{package}.") for name in PACKAGES}
    assert imported - inner - face_of(package) == set()


@pytest.mark.parametrize("package", sorted(PACKAGES - FOUND_BY_DJANGO))
def test_a_package_s_face_names_only_what_it_has(package):
    modules = {name.removeprefix(f"{package}.") for name in MODULES if name.startswith(f"{package}.")}
    tree = ast.parse(MODULES[package].read_text())
    own = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert face_of(package) - modules - own == set()


def test_the_page_on_the_design_names_modules_that_exist():
    page = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
    named = set(re.findall(r"`([\w/]+\.(?:py|lua)|[\w/]+/)`", page))
    assert len(named) > 30
    assert {name for name in named if not (PACKAGE / name).exists()} == set()


def test_the_page_on_the_design_names_classes_and_functions_that_exist():
    page = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
    nodes = [node for path in MODULES.values() for node in ast.walk(ast.parse(path.read_text()))]
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    defined |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    named = {name for names in re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", page) for name in names.split(".")}
    assert len(named) > 40
    assert named - defined - {"KEYS", "SkipMessage"} == set()  # a command of Redis, and an error of Dramatiq


def test_rules_and_backoff_know_nothing_of_dramatiq():
    for name in (
        "rules/rule",
        "rules/matching",
        "rules/parsing",
        "rules/backoff",
        "rules/retry_after",
        "rules/wait",
        "common/durations",
    ):
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
        "for name in ('redis', 'pika', 'statsd', 'sentry_sdk', 'gevent', 'click', 'rich', 'sqlalchemy'): sys.modules[name] = None\n"
        "import dramatiq_policies, dramatiq_policies.ops\n"
        "from dramatiq_policies.stores import *\n"
        "from dramatiq.brokers.stub import StubBroker\n"
        "dramatiq_policies.install(StubBroker())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LATER = """
import sys
import dramatiq
from dramatiq.brokers.stub import StubBroker
before = set(sys.modules)
import dramatiq_policies

# Each takes a tenth of the import.
assert not {"pathlib", "urllib.parse", "secrets"} & (set(sys.modules) - before)
assert set(dramatiq_policies.__all__) <= set(dir(dramatiq_policies))
broker = dramatiq_policies.install(StubBroker())
dramatiq.actor(lambda: None, actor_name="pay", broker=broker, retry_on=OSError)
ours = {"observability.statsd", "observability._udp", "observability.sentry_patches", "brokers.readers", "observability.election", "observability.fleet_election"} | {
    f"middleware.{name}" for name in ("heartbeat", "metrics", "queue_monitor", "sentry")
}
print(sorted(name for name in ours if f"dramatiq_policies.{name}" in sys.modules))

from dramatiq_policies import *
assert all(value.__module__.startswith("dramatiq") for value in (Heartbeat, Metrics, QueueMonitor, SentryReporter))
assert Threshold is dramatiq_policies.middleware.queue_monitor.Threshold is dramatiq_policies.Threshold
assert vars(dramatiq_policies)["Threshold"] is Threshold
"""


def test_a_module_of_an_optional_client_is_imported_on_first_use_of_its_name():
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
