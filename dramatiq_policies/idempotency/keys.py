"""Idempotency keys: from a template or a callable over what the actor was called with.

A key is text, which users see and hand on. Text alone is ambiguous: 1 and "1", or ("a", "b:c") and ("a:b", "c") between
colons, give the same. So of all values that give one text, only those that a reader of the text would guess have the name
that 0.1.0 gave all of them: an int, or a str that does not look like an int and contains no separator. A key of other values
is a `TypedKey`, whose name is made of typed, length-prefixed values. Workers of 0.1.0 and newer ones so agree on nearly all
names, and no two keys share one.
"""

from __future__ import annotations

import inspect
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..common.texts import encodable
from ..errors import ConfigurationError

__all__ = ["TypedKey", "checked_key", "encodable", "roots_of", "signature_of", "template_key", "text_key", "typed_name"]

_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

#: The text of an int.
_INT = re.compile("0|-?[1-9][0-9]*")
#: The tags of values in a name. A value of another type has its type's name.
_TAGS = {str: "s", int: "i", bool: "b", float: "f", type(None): "n"}


class TypedKey(str):
    """A key whose text other values give, too.

    Attributes:
      parts: The values with their tags, and a template's text between them.
    """

    __slots__ = ("parts",)
    parts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, text: str, parts: Iterable[tuple[str, str]]) -> TypedKey:
        key = cls(text)
        key.parts = tuple(parts)
        return key


def typed_name(*parts: tuple[str, str]) -> str:
    """Tagged texts as one text from which they can be read again: no other parts have the same."""
    return "\2" + "".join(f"{tag}{len(text)}:{text}" for tag, text in map(_encodable, parts))


def _encodable(part: tuple[str, str]) -> tuple[str, str]:
    """The same part; with half a character, which no store can encode, spelt out under a tag of its own."""
    tag, text = part
    if _can_be_encoded(text):
        return part
    return f"{tag}\\", text.replace("\\", "\\\\").encode(errors="backslashreplace").decode()


def _can_be_encoded(text: str) -> bool:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True


def signature_of(fn: Any) -> inspect.Signature:
    """What an actor takes: for a class-based one, what its ``perform`` takes.

    Raises:
      TypeError, ValueError: Its function does not say: some that are written in C.
    """
    inner = inspect.unwrap(fn)
    return inspect.signature(getattr(inner, "perform", fn))


def template_key(
    where: str, template: str, signature: inspect.Signature
) -> Callable[[Sequence[Any], Mapping[str, Any]], str]:
    """The key that a template makes of what an actor with this signature is called with.

    Raises:
      ConfigurationError: It is no template, or names what the actor does not take.
    """
    option = "idempotency_key"
    try:
        roots = set(roots_of(template))
    except ValueError as error:
        raise ConfigurationError.of_option(where, option, f"a template ({error})", template) from None
    parameters = signature.parameters.values()
    known = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    if not roots <= known:
        expected = f"a template over the actor's arguments {sorted(known)}"
        raise ConfigurationError.of_option(where, option, expected, template, "Mend the field's name")
    if not roots and signature.parameters:
        raise ConfigurationError.of_option(
            where, option, "a template with at least one field", template, "Every call would have the same key"
        )
    if not template:
        raise ConfigurationError.of_option(where, option, "a key that is not empty", template)
    names = tuple(p.name for p in parameters if p.kind in _NAMED)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    plain = len(names) == len(signature.parameters)
    format_it = _Template(template).key

    def key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        if plain and len(args) <= len(names):
            values = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            if roots <= values.keys():
                return format_it(values)
        # Slower, and raises what a wrong call raises.
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return format_it(bound.arguments)

    return key


def roots_of(template: str) -> Iterator[str]:
    """The arguments that a template names, also in a field's format."""
    for _, field, form, _ in string.Formatter().parse(template):
        if field is not None:
            yield field.partition(".")[0].partition("[")[0]
            yield from roots_of(form or "")


class _Template:
    """Makes keys of a template's values."""

    def __init__(self, template: str) -> None:
        self.format_map = template.format_map
        #: The text before each field; the field; whether its value is taken as text: it has a format or a conversion.
        self.fields: list[tuple[str, str, bool, str]] = []
        between: set[str] = set()
        splits = True
        before = ""
        for literal, field, form, conversion in string.Formatter().parse(template):
            before += literal
            if field is None:
                continue
            if self.fields:
                between.update(before)
                splits = splits and bool(before)
            written = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            self.fields.append((before, field, bool(form or conversion), f"{{{written}}}"))
            before = ""
        self.after = before
        self.between = frozenset(between)
        #: Whether the text can be split into its values.
        self.splits = splits
        self.name = self.fields[0][1] if len(self.fields) == 1 and not self.fields[0][2] else None

    def key(self, values: Mapping[str, Any]) -> str:
        text = self.format_map(values)
        if self.name is not None and self.name in values:
            # The usual template has one field, and that is an argument.
            value = values[self.name]
            if type(value) is int or (type(value) is str and _looks_like_text(value) and _can_be_encoded(text)):
                return text
        elif not self.fields:
            return text
        found = [self._value(values, *field[1:]) for field in self.fields]
        if self.splits and _can_be_encoded(text) and all(map(self._is_plain, found, self.fields)):
            return text
        parts: list[tuple[str, str]] = []
        for (before, *_), value in zip(self.fields, found, strict=True):
            parts += [("l", before), value]
        return TypedKey.of(text, [*parts, ("l", self.after)])

    def _value(self, values: Mapping[str, Any], field: str, as_text: bool, written: str) -> tuple[str, str]:
        text = written.format_map(values)
        if as_text:
            return "t", text
        value, _ = string.Formatter().get_field(field, (), values)
        return _TAGS.get(type(value)) or f"<{type(value).__qualname__}>", text

    def _is_plain(self, value: tuple[str, str], field: Any) -> bool:
        tag, text = value
        return (tag in "it" or (tag == "s" and _looks_like_text(text))) and self.between.isdisjoint(text)


def _looks_like_text(text: str) -> bool:
    """Whether no int has this text."""
    return not (text[-1:].isdigit() and _INT.fullmatch(text))


def text_key(text: str) -> str:
    """A key that is text as a whole, as against an int."""
    return text if _looks_like_text(text) and _can_be_encoded(text) else TypedKey.of(text, [("s", text)])


def checked_key(key: Any) -> str:
    """What a callable or a message gave as a key.

    Raises:
      TypeError: It is none.
    """
    if isinstance(key, str) and key:
        return text_key(str(key))
    if type(key) is int:
        return str(key)
    # Made of the arguments: what it is does not belong into a log.
    got = "an empty one" if key == "" else f"a {type(key).__name__}"
    raise TypeError(f"idempotency_key: expected a non-empty str or an int, got {got}")
