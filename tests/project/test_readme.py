"""Every Python snippet of the README and the guides runs, in the order of its page."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import dramatiq.broker
import dramatiq.brokers.rabbitmq
import dramatiq.brokers.redis
import pytest
import sentry_sdk
import sqlalchemy
from dramatiq.brokers.stub import StubBroker

import dramatiq_policies
from dramatiq_policies import errors
from examples.orders import gateway
from examples.orders.shop import OrderNotFound

from ..forked import run_forked

ROOT = Path(__file__).parents[2]
#: Kept between runs: mypy takes four seconds without a cache.
CACHE = ROOT / ".mypy_cache" / "readme"
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
#: Followed step by step in tests/kit/test_kit_guide.py.
STEP_BY_STEP = "docs/test-driven-jobs.md"
WITH_SNIPPETS = [page for page in PAGES if page != STEP_BY_STEP and "```python" in (ROOT / page).read_text()]
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]*)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
#: Every page for readers, of examples and benchmarks, too.
WRITTEN = sorted(
    page for where in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md") for page in ROOT.glob(where)
)


class Gateway(gateway.MailGateway):
    """The README's gateway calls its key `key`."""

    def send(self, to, subject, *, key, timeout_ms):
        super().send(to, subject, idempotency_key=key, timeout_ms=timeout_ms)


@pytest.fixture
def shop(monkeypatch, tmp_path):
    """The modules of the snippets: errors and a gateway. Servers are a StubBroker and an SQLite file."""
    module = types.ModuleType("shop")
    for name in ("EmailTimeout", "InvalidEmail", "MissingCredentials", "RateLimited"):
        setattr(module, name, getattr(gateway, name))
    module.OrderNotFound = OrderNotFound
    module.mail_gateway = Gateway()
    monkeypatch.setitem(sys.modules, "shop", module)
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)
    monkeypatch.setattr(sentry_sdk, "init", lambda **_: None)
    monkeypatch.setattr(dramatiq.brokers.redis, "RedisBroker", lambda **_: StubBroker())
    monkeypatch.setattr(dramatiq.brokers.rabbitmq, "RabbitmqBroker", lambda **_: StubBroker())
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/shop.db")
    monkeypatch.setattr(sqlalchemy, "create_engine", lambda _: engine)
    yield module
    engine.dispose()


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_every_snippet_runs_and_its_tests_pass(page, shop, request, caplog, monkeypatch):
    text = (ROOT / page).read_text()
    snippets = list(SNIPPET.finditer(text))
    assert len(snippets) == text.count("```python")
    # A module with a name, for class paths and dotted strings; the get-started page has the name `jobs`.
    module = types.ModuleType("snippets")
    monkeypatch.setitem(sys.modules, "jobs", module)
    for snippet in snippets:
        line = text.count("\n", 0, snippet.start(1))
        exec(compile("\n" * line + snippet[1], page, "exec", dont_inherit=True), module.__dict__)
    for name, test in list(vars(module).items()):
        if name.startswith("test_"):
            caplog.clear()
            test(**{fixture: request.getfixturevalue(fixture) for fixture in inspect.signature(test).parameters})


@pytest.mark.timeout(600)  # mypy computes for four seconds, on a busy machine for minutes.
def test_the_readmes_job_passes_strict_type_checks(tmp_path):
    (tmp_path / "app.py").write_text(SNIPPET.findall((ROOT / "README.md").read_text())[0])
    (tmp_path / "shop.py").write_text(
        "from typing import Any\nmail_gateway: Any\n"
        "class EmailTimeout(Exception): ...\nclass InvalidEmail(Exception): ...\nclass OrderNotFound(Exception): ...\n"
        "class MissingCredentials(Exception): ...\nclass RateLimited(Exception): ...\n"
    )
    # Dramatiq's brokers have no annotations.
    options = ["--strict", "--config-file=", "--untyped-calls-exclude=dramatiq", f"--cache-dir={CACHE}", "app.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/designing-a-job.md"])
def test_the_first_job_of_a_page_passes_the_check(page, tmp_path, shop):
    (tmp_path / "app.py").write_text(SNIPPET.findall((ROOT / page).read_text())[0])
    (tmp_path / "shop.py").write_text(
        "mail_gateway = None\n" + "".join(f"class {name}(Exception): ...\n" for name in vars(shop) if name[0].isupper())
    )
    done = run_forked(
        ["-m", "dramatiq_policies", "check", "app"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ready: 1 actor, 0 errors" in done.stdout


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as made by GitHub and MkDocs."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


def broken(page: Path) -> list[str]:
    found = []
    for link in LINK.findall(page.read_text()):
        if link.startswith("http"):
            if not re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(:\d+)?(/[\w./~%?=&@#+-]*)?", link):
                found.append(link)
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    assert broken(page) == []


def shipped() -> list[Path]:
    """The files and folders that the wheel installs in share/doc, at the same places beside each other."""
    (table,) = re.findall(r"wheel\.shared-data\]\n((?:\".*\n)+)", (ROOT / "pyproject.toml").read_text())
    places = re.findall(r'^"(.+)" = "share/doc/dramatiq-policies/(.+)"$', table, re.MULTILINE)
    assert len(places) > 3
    assert all(source == target for source, target in places)
    return [ROOT / source for source, _ in places]


def test_an_installed_page_links_only_to_installed_files():
    places = shipped()
    pages = [page for place in places for page in ([place] if place.suffix == ".md" else place.rglob("*.md"))]
    outside = []
    for page in pages:
        for link in LINK.findall(page.read_text()):
            target = (page.parent / link.partition("#")[0]).resolve()
            if not link.startswith(("http", "#")) and not any(target.is_relative_to(place) for place in places):
                outside.append(f"{page.relative_to(ROOT)}: {link}")
    assert len(pages) > 20
    assert outside == []


def test_links_that_lead_nowhere_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A head, line\n[1](#a-head-line) [2](#none) [3](none.md) [4](http://a.b) [5](https://a) [6](https://a.b/c)"
    )
    assert broken(page) == ["#none", "none.md", "http://a.b", "https://a"]


NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)?::(test_\w+)`")


def test_every_test_that_shows_a_promise_is_there():
    path, named = None, []
    for found, name in NAMED_TEST.findall((ROOT / "docs/guarantees.md").read_text()):
        path = found or path
        named.append((path, name))
    assert len(named) > 10
    missing = [(path, name) for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    assert missing == []


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference.md").read_text()
    named = {*re.findall(r"^::: dramatiq_policies\.(\w+)$", page, re.MULTILINE), *errors.__all__}
    assert set(dramatiq_policies.__all__) - named == {"actor"}  # a function of Dramatiq's


def test_the_reference_has_every_option_of_an_actor():
    page = (ROOT / "docs" / "reference.md").read_text()
    names = list(dramatiq_policies.ActorOptions.__annotations__)
    ours = names[names.index("retry_on") :]
    assert len(ours) > 10
    assert [name for name in ours if f"`{name}`" not in page] == []
