"""The built site has all files linked from the guides (scripts/docs_links.py)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("docs_links", ROOT / "scripts" / "docs_links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rewritten(hook, name):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=name))
    return hook.on_page_markdown((ROOT / "docs" / name).read_text(), page=page)


def test_every_file_that_a_guide_links_to_is_a_page_of_the_site(hook):
    pages = hook.repository_pages()
    linked = set()
    for guide in (ROOT / "docs").glob("*.md"):
        text = rewritten(hook, guide.name)
        assert "](../" not in text
        linked |= set(re.findall(r"\]\((files/[^)]+)\)", text))
    assert any("examples/orders" in link for link in linked)
    assert linked <= set(pages)


def test_a_folder_s_page_leads_to_its_files(hook):
    pages = hook.repository_pages()
    assert "(orders/app.py.md)" in pages["files/examples/orders.md"]
    assert "def send_confirmation" in pages["files/examples/orders/app.py.md"]


def test_a_page_that_shows_a_file_shows_it_as_it_is(hook):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="files/x.md"))
    assert hook.on_page_markdown("[a](../b)", page=page) == "[a](../b)"


def test_the_site_links_to_the_repository_once_its_address_is_filled_in(hook, tmp_path, monkeypatch):
    config = SimpleNamespace(repo_url=None)
    hook.on_config(config)
    assert config.repo_url is None
    text = (ROOT / "pyproject.toml").read_text()
    assert text.count("\n# urls = {") == 1
    (tmp_path / "pyproject.toml").write_text(text.replace("\n# urls = {", "\nurls = {"))
    monkeypatch.setattr(hook, "ROOT", tmp_path)
    hook.on_config(config)
    assert config.repo_url == "https://..."
