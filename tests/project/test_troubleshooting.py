"""The package or Dramatiq prints every text quoted in docs/troubleshooting.md."""

from __future__ import annotations

import re
from pathlib import Path

import dramatiq
import pytest

import dramatiq_policies

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
#: Texts of servers.
FOREIGN = ("PRECONDITION_FAILED", "OOM command", "WRONGTYPE")
#: Values, names of classes and options, and the ends of the parts of a ConfigurationError.
FILLED_IN = re.compile(r"…|-?\d+x?|'x'|\b_?[A-Z]\w+(?:Classifier|Error|Broker|Middleware)\b|retry_on|: |expected ")
BETWEEN_LITERALS = re.compile(r"""["']\s*\n\s*f?["']""")


def sources() -> str:
    """Return the source of both packages, with literals of several lines joined."""
    files = (file for package in (dramatiq_policies, dramatiq) for file in Path(package.__file__).parent.rglob("*.py"))
    return BETWEEN_LITERALS.sub("", "\n".join(file.read_text() for file in files))


def quoted() -> list[str]:
    """Each sentence in backticks of the first column; options and names are a word or two."""
    cells = (line.split(" | ")[0] for line in PAGE.splitlines() if line.startswith("| "))
    found = [text for cell in cells for text in re.findall("`([^`]+)`", cell) if text.count(" ") > 2]
    return [text for text in found if not text.startswith(FOREIGN)]


@pytest.fixture(scope="module")
def printed() -> str:
    return sources()


def test_the_page_quotes_texts():
    assert len(quoted()) > 10


@pytest.mark.parametrize("text", quoted())
def test_each_quoted_text_is_one_that_is_printed(text, printed):
    pieces = [piece.strip(" ()'.") for piece in FILLED_IN.split(text)]
    missing = [piece for piece in pieces if piece and piece not in printed]
    assert missing == []
