"""Run Dramatiq's own tests with our bundle in place of the default middleware.

python3 scripts/with_services.py --private python scripts/dramatiq_suite.py [--stock] CHECKOUT [PYTEST ARGUMENTS...]

CHECKOUT is a checkout of github.com/Bogdanp/dramatiq. The script copies the tests and runs them against the installed dramatiq.
`--stock` changes nothing in Dramatiq: a failure is then Dramatiq's own. The suite calls FLUSHALL and expects servers on the
standard ports, so the script requires the private servers of with_services.py. Every Python process of the run has
scripts/dramatiq_suite/ on its path, which redirects the ports, installs the bundle, and replaces memcached.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stock", action="store_true", help="without our bundle, for comparison")
    parser.add_argument("checkout", type=Path)
    options, pytest_arguments = parser.parse_known_args()
    tests = options.checkout / "tests"
    if not (tests / "test_actors.py").exists():
        parser.error(f"{options.checkout} is no checkout of Dramatiq: set CHECKOUT to one.")
    if not os.environ.get("DP_PRIVATE_SERVICES"):
        parser.error("this suite empties its servers: run it through scripts/with_services.py --private.")

    environment = {
        **os.environ,
        "DP_SUITE_MIDDLEWARE": "stock" if options.stock else "bundle",
        # On SIGHUP and --watch, Dramatiq starts itself anew as "python", looked up here.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": str(HERE / "dramatiq_suite"),
    }
    with tempfile.TemporaryDirectory(prefix="dp-suite-") as name:
        folder = Path(name)
        shutil.copytree(tests, folder / "tests", ignore=shutil.ignore_patterns("benchmarks", "__pycache__"))
        (folder / "pytest.ini").write_text("[pytest]\n")
        report = folder / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-ra", f"--junitxml={report}", "--timeout=120", "tests"]
        # The test calls rabbitmqctl and would stop the machine's own RabbitMQ.
        command.append("--deselect=tests/test_rabbitmq.py::test_rabbitmq_workers_handle_rabbit_failures_gracefully")
        code = subprocess.run([*command, *pytest_arguments], cwd=folder, env=environment, check=False).returncode
        print(f"dramatiq_suite: {summary(report)}; {environment['DP_SUITE_MIDDLEWARE']} middleware", end=", ")
        print(f"dramatiq {version('dramatiq')}, tests of {checkout_version(options.checkout)}, memcached stood in for")
    return code


def summary(report: Path) -> str:
    if not report.exists():
        return "nothing was run"
    suite = ET.parse(report).getroot()[0]
    tests, failures, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    passed = tests - failures - errors - skipped
    return f"{passed} passed, {failures} failed, {errors} errors, {skipped} skipped"


def checkout_version(checkout: Path) -> str:
    found = re.search(r'^__version__ = "(.+)"', (checkout / "dramatiq" / "__init__.py").read_text(), re.MULTILINE)
    return found.group(1) if found else "unknown"


if __name__ == "__main__":
    sys.exit(main())
