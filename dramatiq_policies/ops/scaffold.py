"""A job and its tests, written from a design: the rules stand, the tests fail, and the job is to be written."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .apps import OperationError
from .designs import Design, Named

__all__ = ["module_name", "render_conftest", "render_job", "render_tests", "scaffold"]


def scaffold(design: Design, file: Path, tests: Path) -> list[Path]:
    """Write the job's module and its tests; what was written.

    Parameters:
      design: A complete one.
      file: The module, below the current folder: ``shop/jobs/send_confirmation.py``. Its name is the job's.
      tests: The folder for ``test_<job>.py``. It also gets a ``conftest.py`` if it has none and no package of the module
        sets a broker.

    Raises:
      OperationError: If one of them exists, or the path is no module's. Nothing is written then.
    """
    module = module_name(file)
    test_file, conftest = tests / f"test_{file.stem}.py", tests / "conftest.py"
    for one in (file, test_file):
        if one.exists():
            raise OperationError(f"{one} is there already, and is not overwritten.")
    texts = {file: render_job(design, file.stem), test_file: render_tests(design, module, file.stem)}
    if not conftest.exists() and not _sets_broker(file):
        texts[conftest] = render_conftest(_app_of(file))
    for path, text in texts.items():
        _make_folders(path.parent)
        path.write_text(text)
    return list(texts)


def module_name(file: Path) -> str:
    """The dotted name of a module from its file.

    Raises:
      OperationError: If it can't have one.
    """
    parts = list(file.with_suffix("").parts)
    if parts[:1] == ["src"]:
        parts = parts[1:]
    if file.is_absolute() or file.suffix != ".py" or not parts or not all(part.isidentifier() for part in parts):
        raise OperationError(f"{file} is no module; name a file below this folder, shop/jobs/send_confirmation.py.")
    return ".".join(parts)


def _make_folders(folder: Path) -> None:
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        # A new folder of a package is a package.
        if (one.parent / "__init__.py").exists():
            (one / "__init__.py").touch()


def _sets_broker(file: Path) -> bool:
    """Whether importing the module imports something of its packages that sets the broker."""
    return any(_mentions(folder / "__init__.py") for folder in file.parents)


def _mentions(file: Path) -> bool:
    try:
        return "set_broker(" in file.read_text()
    except (OSError, ValueError):
        return False


def _app_of(file: Path) -> str | None:
    """The one module of the same package that sets the broker, if there is one."""
    top = file.parts[0] if file.parts[0] != "src" else str(Path(*file.parts[:2]))
    found = [one for one in sorted(Path(top).rglob("*.py")) if _mentions(one)] if len(file.parts) > 1 else []
    return module_name(found[0]).removesuffix(".__init__") if len(found) == 1 else None


class _Imports:
    """Import lines, sorted as ruff sorts them, and how each thing is then called."""

    def __init__(self) -> None:
        self.lines: dict[str, set[str]] = {}
        self.taken: dict[str, str] = {}

    def add(self, module: str, name: str) -> str:
        if module == "builtins":
            return name
        first = name.partition(".")[0]
        if self.taken.setdefault(first, module) != module:
            # Two of one name: this one is called by its module's.
            self.lines.setdefault(module, set()).add("")
            return f"{module}.{name}"
        self.lines.setdefault(module, set()).add(first)
        return name

    def render(self) -> str:
        rendered = []
        for module, names in sorted(self.lines.items(), key=lambda entry: entry[0].casefold()):
            if "" in names:
                rendered.append(f"import {module}")
            listed = sorted(names - {""}, key=_as_isort)
            line = f"from {module} import {', '.join(listed)}"
            if listed and len(line) <= _WIDTH:
                rendered.append(line)
            elif listed:
                rendered.append("\n".join([f"from {module} import (", *(f"    {one}," for one in listed), ")"]))
        return "\n".join(rendered)


#: Ruff's own line length, which fits into any that a project has.
_WIDTH = 88


def _as_isort(name: str) -> tuple[int, str]:
    """Constants, classes, and then the rest."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


def render_job(design: Design, name: str) -> str:
    """The module of the job."""
    imports, ours = _Imports(), _Imports()
    options = [f'queue_name="{design.queue}"']
    if design.transient:
        ours.add("dramatiq_policies", "RetryPolicy")
        rows = "".join(f"        {_called(imports, one)}: RetryPolicy(attempts=5),\n" for one in design.transient)
        options.append(f"retry_on={{\n{rows}    }}")
    else:
        options.append("retry_on=()")
    options.append(f"discard_on={_listed(imports, design.permanent)}")
    if design.configuration:
        options.append(f"alert_on={_listed(imports, design.configuration)}")
    if design.idempotency_key is not None:
        options.append(f"idempotency_key={_quoted(design.idempotency_key)}")
    elif design.idempotent:
        options.append("idempotent=True")
    if design.done_when is not None:
        options.append(f"done_when={_called(imports, design.done_when)}")
    options.append(f"timeout={design.timeout:_}")
    options.append(f'tags={{"criticality": {_quoted(design.criticality)}}}')
    listed = "".join(f"    {option},\n" for option in options)
    third_party = "\n".join(part for part in ("import dramatiq", ours.render()) if part)
    parts = ["from __future__ import annotations", third_party, imports.render()]
    head = "\n\n".join(part for part in parts if part)
    signature = f"def {name}({', '.join(map(str, design.arguments))}) -> None:"
    if len(signature) > _WIDTH:
        signature = "\n".join([f"def {name}(", *(f"    {argument}," for argument in design.arguments), ") -> None:"])
    return (
        f"{head}\n\n\n@dramatiq.actor(\n{listed})\n{signature}\n{_docstring(design)}\n"
        f'    raise NotImplementedError("{name} is not written yet")\n'
    )


def _docstring(design: Design) -> str:
    summary = _sentence(design.purpose)
    body = [
        textwrap.fill(f"{label}: {text}", 80 - 4)
        for label, text in (("Trigger", design.trigger), ("Effect", design.effect))
    ]
    whole = f'"""{textwrap.fill(summary, 80 - 7)}\n\n' + "\n".join(body) + '\n"""'
    return textwrap.indent(whole.replace("\\", "\\\\"), "    ")


def _sentence(text: str) -> str:
    text = " ".join(text.replace('"""', "'''").split())
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _called(imports: _Imports, named: Named) -> str:
    return imports.add(named.module, named.name)


def _listed(imports: _Imports, named: tuple[Named, ...]) -> str:
    if not named:
        return "()"
    names = [_called(imports, one) for one in named]
    if len(names) == 1:
        return names[0]
    line = f"({', '.join(names)})"
    return line if len(line) <= _WIDTH - 20 else "(\n" + "".join(f"        {one},\n" for one in names) + "    )"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


_EXAMPLES = {"int": "1", "float": "1.5", "bool": "True", "dict": "{}", "list": "[]", "tuple": "[]", "None": "None"}


def _example(name: str, annotation: str | None) -> str:
    return _EXAMPLES.get(re.split(r"[\[ |]", annotation or "str")[0], f'"{name}"')


def render_tests(design: Design, module: str, name: str) -> str:
    """The tests of the job, which fail until it is written."""
    errors, theirs, ours = _Imports(), _Imports(), _Imports()
    kit = ["assert_crash_safe", "fail", "hang", *(["redeliver"] if design.idempotency_key or design.idempotent else [])]
    for one in kit:
        ours.add("dramatiq_policies.testing", one)
    tests = [_succeeds(), _twice(design)]
    tests += [_retried(one, _raised(errors, one)) for one in design.transient]
    tests += [_discarded(one, _raised(errors, one)) for one in design.permanent]
    if design.configuration:
        ours.add("dramatiq_policies.ops", "replay")
    tests += [_alerted(one, _raised(errors, one)) for one in design.configuration]
    tests += [_times_out(design), _crashes(design)]
    for one, called in errors.lines.items():
        theirs.lines.setdefault(one, set()).update(called)
    theirs.add(module, name)
    example = ", ".join(f'"{a.name}": {_example(a.name, a.annotation)}' for a in design.arguments)
    line = f"EXAMPLE = {{{example}}}"
    if len(line) > _WIDTH:
        rows = "".join(f'    "{a.name}": {_example(a.name, a.annotation)},\n' for a in design.arguments)
        line = f"EXAMPLE = {{\n{rows}}}"
    return (
        f'"""{_sentence(design.purpose)}"""\n\n'
        "from __future__ import annotations\n\n"
        f"{ours.render()}\n\n{theirs.render()}\n\n"
        f"# What the job is called with in these tests.\n{line}\n\n\n"
        f"{_effects(design)}\n\n\n" + _fit("\n\n\n".join(tests).replace("JOB", name)) + "\n"
    )


def _fit(text: str) -> str:
    """Calls that are too long, one argument a line; the trailing comma keeps a formatter from joining them again."""
    return "\n".join(_LONG_CALL.sub(_exploded, line) if len(line) > _WIDTH else line for line in text.splitlines())


_LONG_CALL = re.compile(r"^( *)(.*?[\w.]\()(.*)(\):?)$")


def _exploded(found: re.Match[str]) -> str:
    indent, call, arguments, end = found.groups()
    # drain().method(…): the last call is the long one.
    while arguments.startswith(")."):
        more, _, arguments = arguments.partition("(")
        call += f"{more}("
    return "\n".join([indent + call, *(f"{indent}    {one}," for one in arguments.split(", ")), indent + end])


def _effects(design: Design) -> str:
    effect = textwrap.fill(f"To be written: return {design.effect.rstrip('.')}.", 76).replace("\n", "\n    ")
    return f'''def effects():
    """What the job has changed in the world, so that the tests can compare it.

    {effect}
    """


def reset():
    """Undo it. To be written."""'''


def _succeeds() -> str:
    return """def test_it_succeeds(drain):
    JOB.send(**EXAMPLE)
    drain().assert_outcomes(JOB, "succeeded")"""


def _twice(design: Design) -> str:
    if not design.idempotency_key and not design.idempotent:
        return """def test_run_twice_the_result_is_the_same(drain):
    JOB.send(**EXAMPLE)
    drain().assert_nothing_dead()
    once = effects()
    JOB.send(**EXAMPLE)
    run = drain()
    assert run.outcomes(JOB)[-1] in ("succeeded", "duplicate"), run
    assert effects() == once"""
    # Another message of the same key is the same job; without a key of its own, each message is one.
    again = '\n    JOB.send(**EXAMPLE)\n    drain().assert_outcomes(JOB, "duplicate", "duplicate")'
    once = '\n    drain().assert_outcomes(JOB, "duplicate")'
    return f"""def test_sent_or_delivered_again_it_does_not_run_again(drain):
    message = JOB.send(**EXAMPLE)
    drain().assert_outcomes(JOB, "succeeded")
    redeliver(message){again if design.idempotency_key else once}"""


def _slug(error: Named) -> str:
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+", error.name.rpartition(".")[2])
    return "_".join(words).lower()


def _raised(imports: _Imports, error: Named) -> str:
    """How the error is raised: by its class, or an instance where it can't be made without arguments."""
    called = _called(imports, error)
    for arguments in _tried():
        try:
            error.value(*arguments)
        except Exception:  # noqa: S112 - the next arguments may do
            continue
        return called if not arguments else f"{called}({', '.join(map(repr, arguments)).replace(chr(39), chr(34))})"
    return f"{called}.__new__({called})"


def _tried() -> Iterable[tuple[Any, ...]]:
    yield ()
    for count in range(1, 4):
        yield (1,) * count
        yield ("it",) * count


def _retried(error: Named, raised: str) -> str:
    return f"""def test_{_slug(error)}_is_retried(drain):
    with fail(JOB, {raised}):
        JOB.send(**EXAMPLE)
        drain().assert_outcomes(JOB, "retried", "succeeded")"""


def _discarded(error: Named, raised: str) -> str:
    return f"""def test_{_slug(error)}_is_discarded_and_logged_and_the_next_message_runs(drain):
    with fail(JOB, {raised}):
        JOB.send(**EXAMPLE)
        run = drain()
    run.assert_outcomes(JOB, "discarded")
    assert [record.outcome for record in run.logs] == ["discarded"]
    JOB.send(**EXAMPLE)
    drain().assert_outcomes(JOB, "succeeded")"""


def _alerted(error: Named, raised: str) -> str:
    return f"""def test_{_slug(error)}_alerts_and_a_replay_after_the_fix_succeeds(stub_broker, drain):
    with fail(JOB, {raised}):
        JOB.send(**EXAMPLE)
        run = drain()
    run.assert_outcomes(JOB, "alerted")
    assert [record.levelname for record in run.logs] == ["CRITICAL"]
    replay(stub_broker)
    drain().assert_outcomes(JOB, "succeeded")"""


def _times_out(design: Design) -> str:
    return f"""def test_it_ends_at_its_timeout_and_is_tried_again(drain):
    with hang(JOB, times=1):
        JOB.send(**EXAMPLE)
        run = drain()
    run.assert_outcomes(JOB, "retried", "succeeded")
    assert run.elapsed >= {design.timeout:_}"""


def _crashes(design: Design) -> str:
    names = ", ".join("*EXAMPLE.values()" for _ in (design.arguments or ())[:1])
    given = f"{names}, " if names else ""
    return f"""def test_a_crash_at_any_line_leaves_no_other_effect():
    assert_crash_safe(JOB, {given}effects=effects, reset=reset)"""


def render_conftest(app: str | None) -> str:
    """What sets the broker for the tests, where importing the job does not."""
    if app is not None:
        return f'"""The tests run on the broker that the application sets, with stubs in its place."""\n\nimport {app}  # noqa: F401\n'
    return (
        '"""The application sets no broker yet; until it does, the tests do."""\n\n'
        "import dramatiq\nfrom dramatiq.brokers.stub import StubBroker\n"
        "from dramatiq_policies import install\n\n"
        "dramatiq.set_broker(install(StubBroker()))\n"
    )
