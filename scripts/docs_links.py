"""A hook of mkdocs: pages link to files of the repository, which are not on the site; their names stay.

That each of them exists is tested by tests/project/test_readme.py.
"""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_context: Any) -> str:
    return OUTSIDE.sub(lambda match: match[1] if match[1].startswith("`") else f"`{match[1]}`", markdown)
