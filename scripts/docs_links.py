"""A hook of MkDocs: each linked file of the repository gets a page on the site, under `files/`.

So a reader of the built site reaches the examples without a checkout. The address of the repository comes from
`[project.urls]` in pyproject.toml, once somebody has filled it in.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")
REPOSITORY = re.compile(r'^urls = \{ Repository = "([^"]+)" \}$', re.MULTILINE)
LANGUAGES = {".py": "python", ".yml": "yaml", ".json": "json", ".md": "markdown", ".lua": "lua"}
FENCE = "~~~~~~"


def repository_pages(docs: Path = ROOT / "docs") -> dict[str, str]:
    """Return the pages of all linked files, Markdown by their path on the site."""
    pages: dict[str, str] = {}
    for guide in docs.glob("*.md"):
        for _, path in LINK.findall(guide.read_text()):
            pages.update(_pages_of(ROOT / path.rstrip("/")))
    return pages


def _pages_of(path: Path) -> dict[str, str]:
    name = str(path.relative_to(ROOT))
    head = f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n"
    if path.is_file():
        language = LANGUAGES.get(path.suffix, "text")
        return {f"files/{name}.md": f"{head}{FENCE}{language}\n{path.read_text()}\n{FENCE}\n"}
    inside = [file for file in sorted(path.rglob("*")) if file.suffix in LANGUAGES]
    listed = "".join(f"- [{file.relative_to(path)}]({file.relative_to(path.parent)}.md)\n" for file in inside)
    pages = {f"files/{name}.md": head + listed}
    for file in inside:
        pages.update(_pages_of(file))
    return pages


def on_config(config: Any) -> None:
    repository = REPOSITORY.search((ROOT / "pyproject.toml").read_text())
    if repository:
        config.repo_url = repository[1]
        config.repo_name = "Repository"


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, markdown in repository_pages().items():
        files.append(File.generated(config, path, content=markdown))
    return files


def on_page_markdown(markdown: str, page: Any, **_context: Any) -> str:
    if page.file.src_uri.startswith("files/"):
        return markdown
    return LINK.sub(lambda match: f"[{match[1]}](files/{match[2].rstrip('/')}.md)", markdown)
