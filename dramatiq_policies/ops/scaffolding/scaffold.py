"""Write a job's rules and its failing tests from a design."""

from __future__ import annotations

import textwrap
from pathlib import Path

from ..app import OperationError
from .design import Design, Named
from .source import WIDTH, Imports, called, prose, quoted, sentence
from .tests import render_tests

__all__ = ["new_module", "render_conftest", "render_job", "scaffold"]


def scaffold(design: Design, file: Path, tests: Path) -> list[Path]:
    """Write the job's module and its tests, and return the files.

    Parameters:
      design: The design of the job.
      file: The module, below the current folder: ``shop/jobs/send_confirmation.py``. The job gets the name of the file.
      tests: The folder for ``test_<job>.py``. Also writes ``conftest.py`` if the folder has none and no package of the
      module sets a broker.

    Raises:
      OperationError: A file exists, or the path is no module. Nothing is written then.
    """
    module, test_file = new_module(file, tests)
    conftest = tests / "conftest.py"
    texts = {file: render_job(design, file.stem), test_file: render_tests(design, module, file.stem)}
    if not conftest.exists() and not _sets_broker(file):
        texts[conftest] = render_conftest(_app_of(file))
    for path, text in texts.items():
        _make_folders(path.parent)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def new_module(file: Path, tests: Path) -> tuple[str, Path]:
    """Return the dotted name of a module to write, and the file of its tests.

    Raises:
      OperationError: A file exists, or the path is no module.
    """
    module, test_file = _module_name(file), tests / f"test_{file.stem}.py"
    for one in (file, test_file):
        if one.exists():
            raise OperationError(f"{one} exists, and the command overwrites no file: name another file.")
    return module, test_file


def _module_name(file: Path) -> str:
    """Return the dotted name of a module file.

    Raises:
      OperationError: The file is no module below the current folder.
    """
    parts = [*file.parts[:-1], file.stem]
    if parts[:1] == ["src"]:
        parts = parts[1:]
    if file.is_absolute() or file.suffix != ".py" or not parts or not all(part.isidentifier() for part in parts):
        raise OperationError(
            f"{file} is not a module; name a file below this folder, such as shop/jobs/send_confirmation.py."
        )
    return ".".join(parts)


def _make_folders(folder: Path) -> None:
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        # A new folder in a package becomes a package.
        if (one.parent / "__init__.py").exists():
            (one / "__init__.py").touch()


def _sets_broker(file: Path) -> bool:
    """Whether a package of the module sets the broker."""
    return any(_mentions(folder / "__init__.py") for folder in file.parents)


def _mentions(file: Path) -> bool:
    try:
        return "set_broker(" in file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _app_of(file: Path) -> str | None:
    """Return the only module of the package that sets the broker, or None."""
    top = file.parts[0] if file.parts[0] != "src" else str(Path(*file.parts[:2]))
    found = [one for one in sorted(Path(top).rglob("*.py")) if _mentions(one)] if len(file.parts) > 1 else []
    return _module_name(found[0]).removesuffix(".__init__") if len(found) == 1 else None


def render_job(design: Design, name: str) -> str:
    """Return the source of the job's module."""
    imports, ours = Imports(), Imports()
    options = [f"queue_name={quoted(design.queue)}"]
    if design.transient:
        ours.add("dramatiq_policies", "RetryPolicy")
        rows = "".join(f"        {called(imports, one)}: RetryPolicy(attempts=5),\n" for one in design.transient)
        options.append(f"retry_on={{\n{rows}    }}")
    else:
        options.append("retry_on=()")
    options.append(f"discard_on={_listed(imports, design.permanent)}")
    if design.configuration:
        options.append(f"alert_on={_listed(imports, design.configuration)}")
    if design.idempotency_key is not None:
        options.append(f"idempotency_key={quoted(design.idempotency_key)}")
    elif design.idempotent:
        options.append("idempotent=True")
    if design.done_when is not None:
        options.append(f"done_when={called(imports, design.done_when)}")
    options.append(f"timeout={design.timeout:_}")
    options.append(f'tags={{"criticality": {quoted(design.criticality)}}}')
    listed = "".join(f"    {option},\n" for option in options)
    third_party = "\n".join(part for part in ("import dramatiq", ours.render()) if part)
    parts = ["from __future__ import annotations", third_party, imports.render()]
    head = "\n\n".join(part for part in parts if part)
    signature = f"def {name}({', '.join(map(str, design.arguments))}) -> None:"
    if len(signature) > WIDTH:
        signature = "\n".join([f"def {name}(", *(f"    {argument}," for argument in design.arguments), ") -> None:"])
    return (
        f"{head}\n\n\n@dramatiq.actor(\n{listed})\n{signature}\n{_docstring(design)}\n"
        f'    raise NotImplementedError("{name} is not written yet")\n'
    )


def _docstring(design: Design) -> str:
    summary = sentence(design.purpose)
    body = [
        textwrap.fill(f"{label}: {prose(text)}", 80 - 4)
        for label, text in (("Trigger", design.trigger), ("Effect", design.effect))
    ]
    whole = f'"""{textwrap.fill(summary, 80 - 7)}\n\n' + "\n".join(body) + '\n"""'
    return textwrap.indent(whole, "    ")


def _listed(imports: Imports, named: tuple[Named, ...]) -> str:
    if not named:
        return "()"
    names = [called(imports, one) for one in named]
    if len(names) == 1:
        return names[0]
    line = f"({', '.join(names)})"
    return line if len(line) <= WIDTH - 20 else "(\n" + "".join(f"        {one},\n" for one in names) + "    )"


def render_conftest(app: str | None) -> str:
    """Return the source of a ``conftest.py`` that sets the broker for the tests."""
    if app is not None:
        return f'"""The tests run on the broker that the application sets, with stubs in its place."""\n\nimport {app}  # noqa: F401\n'
    return (
        '"""The application sets no broker yet; until it does, the tests do."""\n\n'
        "import dramatiq\nfrom dramatiq.brokers.stub import StubBroker\n"
        "from dramatiq_policies import ErrorClassifier, RetryPolicy, install\n\n"
        "broker = install(\n"
        "    StubBroker(),\n"
        "    error_classifier=ErrorClassifier(unclassified=RetryPolicy(attempts=5)),\n"
        ")\n"
        "dramatiq.set_broker(broker)\n"
    )
