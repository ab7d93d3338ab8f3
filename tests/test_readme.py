"""Every Python snippet of the README and the guides runs, in the order of its page."""

from __future__ import annotations

import inspect
import re
import sys
import types
from pathlib import Path

import dramatiq.broker
import dramatiq.brokers.redis
import pytest
import sentry_sdk
from dramatiq.brokers.stub import StubBroker

from examples.orders import gateway
from examples.orders.shop import OrderNotFound

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
#: Followed step by step in tests/test_kit_guide.py.
STEP_BY_STEP = "docs/test-driven-jobs.md"
WITH_SNIPPETS = [page for page in PAGES if page != STEP_BY_STEP and "```python" in (ROOT / page).read_text()]
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")


class Gateway(gateway.MailGateway):
    """The README's gateway calls its key `key`."""

    def send(self, to, subject, *, key, timeout_ms):
        super().send(to, subject, idempotency_key=key, timeout_ms=timeout_ms)


@pytest.fixture
def shop(monkeypatch):
    """What the snippets import: errors and a gateway, and a StubBroker where they make a RedisBroker."""
    module = types.ModuleType("shop")
    for name in ("EmailTimeout", "InvalidEmail", "MissingCredentials", "RateLimited"):
        setattr(module, name, getattr(gateway, name))
    module.OrderNotFound = OrderNotFound
    module.mail_gateway = Gateway()
    monkeypatch.setitem(sys.modules, "shop", module)
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)
    monkeypatch.setattr(sentry_sdk, "init", lambda **_: None)
    monkeypatch.setattr(dramatiq.brokers.redis, "RedisBroker", lambda **_: StubBroker())
    return module


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_every_snippet_runs_and_its_tests_pass(page, shop, request, caplog):
    text = (ROOT / page).read_text()
    snippets = list(SNIPPET.finditer(text))
    assert len(snippets) == text.count("```python")
    # A module of its own, since class paths and dotted strings name it.
    module = types.ModuleType("snippets")
    for snippet in snippets:
        line = text.count("\n", 0, snippet.start(1))
        exec(compile("\n" * line + snippet[1], page, "exec"), module.__dict__)
    for name, test in list(vars(module).items()):
        if name.startswith("test_"):
            caplog.clear()
            test(**{fixture: request.getfixturevalue(fixture) for fixture in inspect.signature(test).parameters})


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page):
    targets = LINK.findall((ROOT / page).read_text())
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)?::(test_\w+)`")


def test_every_test_that_shows_a_promise_is_there():
    path, named = None, []
    for found, name in NAMED_TEST.findall((ROOT / "docs/guarantees.md").read_text()):
        path = found or path
        named.append((path, name))
    assert len(named) > 10
    missing = [(path, name) for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    assert missing == []
