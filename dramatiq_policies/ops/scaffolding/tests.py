"""Write the tests of a job from its design."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import Any

from .design import Design, Named
from .source import WIDTH, Imports, called, prose, sentence

__all__ = ["render_tests"]


_EXAMPLES = {"int": "1", "float": "1.5", "bool": "True", "dict": "{}", "list": "[]", "tuple": "[]", "None": "None"}


def _example(name: str, annotation: str | None) -> str:
    return _EXAMPLES.get(re.split(r"[\[ |]", annotation or "str")[0], f'"{name}"')


def render_tests(design: Design, module: str, name: str) -> str:
    """Return the source of the tests. The tests fail until you write the job."""
    errors, theirs, ours = Imports(), Imports(), Imports()
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
    for one, names in errors.lines.items():
        theirs.lines.setdefault(one, set()).update(names)
    theirs.add(module, name)
    example = ", ".join(f'"{a.name}": {_example(a.name, a.annotation)}' for a in design.arguments)
    line = f"EXAMPLE = {{{example}}}"
    if len(line) > WIDTH:
        rows = "".join(f'    "{a.name}": {_example(a.name, a.annotation)},\n' for a in design.arguments)
        line = f"EXAMPLE = {{\n{rows}}}"
    return (
        f'"""{sentence(design.purpose)}"""\n\n'
        "from __future__ import annotations\n\n"
        f"import pytest\n{ours.render()}\n\n{theirs.render()}\n\n"
        f"# The arguments of the job in these tests.\n{line}\n\n\n"
        f"{_effects(design)}\n\n\n" + _fit("\n\n\n".join(tests).replace("JOB", name)) + "\n"
    )


def _fit(text: str) -> str:
    """Break long calls, one argument per line; the trailing comma stops a formatter from joining the lines."""
    return "\n".join(_LONG_CALL.sub(_exploded, line) if len(line) > WIDTH else line for line in text.splitlines())


_LONG_CALL = re.compile(r"^( *)(.*?[\w.]\()(.*)(\):?)$")


def _exploded(found: re.Match[str]) -> str:
    indent, call, arguments, end = found.groups()
    # drain().method(…): break the last call.
    while arguments.startswith(")."):
        more, _, arguments = arguments.partition("(")
        call += f"{more}("
    return "\n".join([indent + call, *(f"{indent}    {one}," for one in arguments.split(", ")), indent + end])


def _effects(design: Design) -> str:
    effect = textwrap.fill(f"To be written: return {prose(design.effect).rstrip('.')}.", 76).replace("\n", "\n    ")
    return f'''def effects():
    """The effect of the job in the world, for the tests to compare.

    {effect}
    """


def reset():
    """Undo it. To be written."""


@pytest.fixture(autouse=True)
def each_test_begins_without_effects():
    reset()'''


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
    # A second message with the same key is a duplicate; without a key, only the same message.
    again = '\n    JOB.send(**EXAMPLE)\n    drain().assert_outcomes(JOB, "duplicate", "duplicate")'
    once = '\n    drain().assert_outcomes(JOB, "duplicate")'
    return f"""def test_sent_or_delivered_again_it_does_not_run_again(drain):
    message = JOB.send(**EXAMPLE)
    drain().assert_outcomes(JOB, "succeeded")
    redeliver(message){again if design.idempotency_key else once}"""


def _slug(error: Named) -> str:
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+", error.name.rpartition(".")[2])
    return "_".join(words).lower()


def _raised(imports: Imports, error: Named) -> str:
    """Return the source that makes the error: its class, or an instance if the class needs arguments."""
    made = called(imports, error)
    for arguments in _tried():
        try:
            error.value(*arguments)
        except Exception:  # noqa: S112 - the next arguments may do
            continue
        return made if not arguments else f"{made}({', '.join(map(repr, arguments)).replace(chr(39), chr(34))})"
    return f"{made}.__new__({made})"


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
    given = "*EXAMPLE.values(), " if design.arguments else ""
    return f"""def test_a_crash_at_any_line_leaves_no_other_effect():
    assert_crash_safe(JOB, {given}effects=effects, reset=reset)"""
