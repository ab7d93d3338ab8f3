"""Build the sdist and the wheel, check both, and install each extra alone.

python3 scripts/release_check.py      (or make release-check; about three minutes, with a package index)

1. sdist and wheel are built, and their metadata is valid (twine).
2. The wheel holds the files of the package that git knows, py.typed among them, and nothing else; and
   the guides and examples, in share/doc.
3. Importing dramatiq_policies takes under 30 ms of CPU more than importing dramatiq.
4. Each extra alone, in an empty environment: the modules of the extra can be imported, the others name the missing extra, and
   the tests for the extra pass.
5. CHANGELOG.md names the newest Dramatiq, as installed by `all`, among the tested versions.
6. pip-audit knows no vulnerability of the packages installed by `all`. Without its database the check prints a line and passes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORT_MS = 30
TEST_TOOLS = ["pytest>=8.3", "pytest-timeout>=2.3", "hypothesis>=6.100"]

#: A module of each extra.
NEEDS = {
    "": "dramatiq_policies.testing",
    "redis": "dramatiq_policies.stores.redis",
    "rabbitmq": "dramatiq_policies.brokers.rabbitmq.transport",
    "statsd": "statsd",
    "sentry": "sentry_sdk",
    "cli": "dramatiq_policies.cli",
    "watch": "watchdog",
}
#: Code whose error must name the missing extra.
MISSING = {
    "redis": "from dramatiq_policies.stores.redis import RedisStore; RedisStore()",
    "cli": "from dramatiq_policies.__main__ import main; main()",
}
BASE_TESTS = [
    "rules/test_rules.py",
    "rules/test_backoff.py",
    "common/test_durations.py",
    "middleware/test_error_classifier_*.py",
]
TESTS = {
    "": [*BASE_TESTS, "middleware/test_timeout.py"],
    "statsd": ["middleware/test_metrics.py"],
    "sentry": ["middleware/test_sentry.py"],
    "cli": ["cli/test_command.py"],
}


def main() -> int:
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="dp-release-") as name:
        folder = Path(name)
        tools = environment(folder / "tools", "build>=1.2", "twine>=6", "pip-audit>=2.7")
        say("sdist, wheel and their metadata")
        run(tools, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT))
        built = sorted((folder / "dist").iterdir())
        run(tools, "-m", "twine", "check", "--strict", *map(str, built))
        (wheel,) = (path for path in built if path.suffix == ".whl")
        failures += contents(wheel)
        for extra in NEEDS:
            say(f"extra {extra or '(none)'}")
            failures += alone(folder, wheel, extra)
        say("everything together")
        everything = environment(folder / "all", f"{wheel}[all]")
        failures += newest_dramatiq(everything)
        failures += audit(tools, everything)
    for failure in failures:
        say(f"NOT FIT: {failure}")
    if not failures:
        say("fit for a release")
    return bool(failures)


def contents(wheel: Path) -> list[str]:
    known = set(subprocess.check_output(["git", "ls-files", "dramatiq_policies"], cwd=ROOT, text=True).splitlines())
    with zipfile.ZipFile(wheel) as archive:
        installed = {entry.partition(".data/data/share/doc/dramatiq-policies/")[2] for entry in archive.namelist()}
        packed = {entry for entry in archive.namelist() if ".dist-info/" not in entry and ".data/" not in entry}
        (record,) = (entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        metadata = archive.read(record).decode()
    failures = [f"the wheel lacks {path}" for path in sorted(known - packed)]
    failures += [f"the wheel has {path}, which is not in git" for path in sorted(packed - known)]
    guides = ["git", "ls-files", "README.md", "CONTRIBUTING.md", "LICENSE", "docs", "examples"]
    missing = set(subprocess.check_output(guides, cwd=ROOT, text=True).splitlines()) - installed
    failures += [f"the wheel's share/doc lacks {path}" for path in sorted(missing)]
    if "dramatiq_policies/py.typed" not in packed:
        failures.append("the wheel lacks py.typed")
    for extra in [*NEEDS, "all"]:
        if extra and f"Provides-Extra: {extra}\n" not in metadata:
            failures.append(f"the metadata lacks the extra {extra}")
    return failures


def alone(folder: Path, wheel: Path, extra: str) -> list[str]:
    place = folder / f"extra-{extra or 'none'}"
    python = environment(place, f"{wheel}[{extra}]" if extra else str(wheel))
    failures = []
    if not extra:
        failures += import_time(python)
    done = attempt(python, "-c", f"import dramatiq_policies, {NEEDS[extra]}")
    if done.returncode:
        failures.append(f"extra {extra!r}: {NEEDS[extra]} can't be imported: {done.stderr.strip()[-300:]}")
    for other, code in MISSING.items():
        if not extra:
            done = attempt(python, "-c", code)
            if f"dramatiq-policies[{other}]" not in done.stderr:
                failures.append(
                    f"without the extra {other!r} nobody is told to install it: {done.stderr.strip()[-300:]}"
                )
    if extra in TESTS:
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TEST_TOOLS)
        tests = place / "tests"
        copied = subprocess.run(
            f"git ls-files -z -- tests examples pyproject.toml | tar -c --null -T - | tar -x -C {place}",
            shell=True,
            cwd=ROOT,
            check=False,
        )
        done = attempt(
            python,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *(str(path) for t in TESTS[extra] for path in sorted(tests.glob(t))),
            cwd=place,
        )
        say(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no test ran")
        if copied.returncode or done.returncode:
            failures.append(f"extra {extra!r}: its tests fail: {done.stdout[-1_500:]}")
    return failures


def import_time(python: str) -> list[str]:
    code = (
        "import dramatiq, time; began = time.process_time(); import dramatiq_policies; "
        "print((time.process_time() - began) * 1_000)"
    )
    # The minimum: anything above comes from other load on the machine.
    took = min(float(attempt(python, "-c", code).stdout) for _ in range(15))
    say(f"import: {took:.1f} ms of CPU over dramatiq's own")
    return [] if took < IMPORT_MS else [f"the import takes {took:.1f} ms over dramatiq's own; at most {IMPORT_MS}"]


def newest_dramatiq(python: str) -> list[str]:
    code = "from importlib.metadata import version; print(version('dramatiq'))"
    version = attempt(python, "-c", code).stdout.strip()
    tested = re.search(r"tested with Dramatiq (.+?),", (ROOT / "CHANGELOG.md").read_text())
    named = tested.group(1) if tested else "none"
    say(f"dramatiq {version} is the newest; tested with {named}")
    return [] if version in named.split() else [f"CHANGELOG.md says tested with {named}, and the newest is {version}"]


def audit(tools: str, python: str) -> list[str]:
    frozen = attempt(python, "-m", "pip", "freeze", "--exclude", "dramatiq-policies").stdout
    requirements = Path(python).parent / "frozen.txt"
    requirements.write_text("\n".join(line for line in frozen.splitlines() if "@ file" not in line))
    done = attempt(tools, "-m", "pip_audit", "--no-deps", "--disable-pip", "-r", str(requirements))
    if done.returncode == 0:
        say("pip-audit knows no vulnerability")
        return []
    if "Found" in done.stderr and "vulnerabilit" in done.stderr:
        return [f"pip-audit: {done.stdout[-1_500:]}"]
    say("pip-audit could not ask its database: not audited")
    return []


def environment(folder: Path, *requirements: str) -> str:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)
    return python


def run(python: str, *arguments: str) -> None:
    subprocess.run([python, *arguments], check=True, cwd=tempfile.gettempdir())


def attempt(python: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    place = tempfile.gettempdir() if cwd is None else cwd
    return subprocess.run([python, *arguments], capture_output=True, text=True, check=False, cwd=place)


def say(text: str) -> None:
    print(f"release_check: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
