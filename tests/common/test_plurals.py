"""Counts in texts, and a walk over the sources for texts that leave the number to the reader."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dramatiq_policies
from dramatiq_policies.common.plurals import counted

SOURCES = sorted(Path(dramatiq_policies.__file__).parent.rglob("*.py"))
#: "message(s)", or a number that is formatted before a plural.
NOUNS = (
    "actor|attempt|bodie|call|consumer|dead letter|deliverie|ending|entrie|error|finding|job|key|letter|message|queue|result|retrie|"
    "row|start|time|warning|worker"
)
LAZY = re.compile(rf"\(s\)|\(ies\)|(?:%d|%s|\0) (?:{NOUNS})s\b")
#: Texts whose number is never 1.
NEVER_ONE = ("This worker could not read %d messages in a row", "\0 dead letters begin with")


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [
        (0, ("message",), "0 messages"),
        (1, ("message",), "1 message"),
        (2, ("message",), "2 messages"),
        (1, ("delivery", "deliveries"), "1 delivery"),
        (3, ("delivery", "deliveries"), "3 deliveries"),
    ],
)
def test_a_noun_agrees_with_its_number(count, words, text):
    assert counted(count, *words) == text


def texts(tree: ast.AST) -> Iterator[str]:
    """Every text of a module but its docstrings; formatted values as NUL."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_no_text_leaves_the_number_to_the_reader():
    assert len(SOURCES) > 100
    found = [
        f"{path.name}: {text!r}"
        for path in SOURCES
        for text in texts(ast.parse(path.read_text()))
        if LAZY.search(text) and not text.startswith(NEVER_ONE)
    ]
    assert not found
