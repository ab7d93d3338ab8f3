"""Write source: sorted import lines, and texts."""

from __future__ import annotations

import json

from .design import Named

__all__ = ["WIDTH", "Imports", "called", "prose", "quoted", "sentence"]


class Imports:
    """Import lines, sorted as ruff sorts them, and how each thing is then called."""

    def __init__(self) -> None:
        self.lines: dict[str, set[str]] = {}
        self.taken: dict[str, str] = {}

    def add(self, module: str, name: str) -> str:
        if module == "builtins":
            return name
        first = name.partition(".")[0]
        if self.taken.setdefault(first, module) != module:
            # Two objects with the same name: use the module's name for this object.
            self.lines.setdefault(module, set()).add("")
            return f"{module}.{name}"
        self.lines.setdefault(module, set()).add(first)
        return name

    def render(self) -> str:
        rendered = []
        for module, names in sorted(self.lines.items(), key=lambda entry: entry[0].casefold()):
            if "" in names:
                rendered.append(f"import {module}")
            listed = sorted(names - {""}, key=_as_isort)
            line = f"from {module} import {', '.join(listed)}"
            if listed and len(line) <= WIDTH:
                rendered.append(line)
            elif listed:
                rendered.append("\n".join([f"from {module} import (", *(f"    {one}," for one in listed), ")"]))
        return "\n".join(rendered)


#: Ruff's default line length.
WIDTH = 88


def _as_isort(name: str) -> tuple[int, str]:
    """Constants, classes, and then the rest."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


def called(imports: Imports, named: Named) -> str:
    """Import an object and return its name in the source."""
    return imports.add(named.module, named.name)


def quoted(text: str) -> str:
    """A string literal."""
    return json.dumps(text, ensure_ascii=False)


def prose(text: str) -> str:
    """Return a text on one line, escaped for a docstring."""
    return " ".join(text.split()).replace("\\", "\\\\").replace('"""', "'''")


def sentence(text: str) -> str:
    """Return a text as a sentence, escaped for a docstring."""
    text = prose(text)
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
