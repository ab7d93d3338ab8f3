"""Idempotency keys: made from an actor's arguments by a template or a callable.

A key is text: users see keys and pass them to other services. Text alone is ambiguous: 1 and "1" give the same text, and so
do ("a", "b:c") and ("a:b", "c") with a colon between. Version 0.1.0 named the register by the text alone. Today only the
obvious values of a text keep this name: an int, or a str that does not look like an int and contains no separator. A key of
other values is a `TypedKey`, with a name built from typed, length-prefixed values. So workers of 0.1.0 and newer workers
agree on nearly all names, and no two keys share a name.
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
#: The tags of values in a name. Values of other types have the name of the type as tag.
_TAGS = {str: "s", int: "i", bool: "b", float: "f", type(None): "n"}


class TypedKey(str):
    """A key with an ambiguous text: other values give the same text.

    Attributes:
      parts: The tagged values, and the template's text between the values.
    """

    __slots__ = ("parts",)
    parts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, text: str, parts: Iterable[tuple[str, str]]) -> TypedKey:
        key = cls(text)
        key.parts = tuple(parts)
        return key


def typed_name(*parts: tuple[str, str]) -> str:
    """Join tagged texts into one text. No other parts give the same text."""
    return "\2" + "".join(f"{tag}{len(text)}:{text}" for tag, text in map(_encodable, parts))


def _encodable(part: tuple[str, str]) -> tuple[str, str]:
    """Return a part that every store can encode: lone surrogates are escaped, and the tag is marked."""
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
    """Return the signature of an actor's function; for a class-based actor, of ``perform``.

    Raises:
      TypeError, ValueError: The function has no signature, like some functions written in C.
    """
    inner = inspect.unwrap(fn)
    return inspect.signature(getattr(inner, "perform", fn))


def template_key(
    where: str, template: str, signature: inspect.Signature
) -> Callable[[Sequence[Any], Mapping[str, Any]], str]:
    """Compile a template into a function from an actor's arguments to the key.

    Parameters:
      where: Names the actor in the error.
      template: Such as ``"charge:{order_id}"``.
      signature: The actor's signature.

    Raises:
      ConfigurationError: The template is invalid, or names an argument that the actor does not take.
    """
    option = "idempotency_key"
    try:
        roots = set(roots_of(template))
    except ValueError as error:
        raise ConfigurationError.of_option(where, option, f"a template ({error})", template) from None
    parameters = signature.parameters.values()
    known = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    if not roots <= known:
        expected = f"a template with fields from the actor's parameters {sorted(known)}"
        raise ConfigurationError.of_option(where, option, expected, template, "Correct the name of the field")
    if not roots and signature.parameters:
        raise ConfigurationError.of_option(
            where, option, "a template with at least one field", template, "Without a field every call has the same key"
        )
    if not template:
        raise ConfigurationError.of_option(where, option, "a non-empty key", template)
    names = tuple(p.name for p in parameters if p.kind in _NAMED)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    plain = len(names) == len(signature.parameters)
    format_it = _Template(template).key

    def key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        if plain and len(args) <= len(names):
            values = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            if roots <= values.keys():
                return format_it(values)
        # Slower, and raises the TypeError of a wrong call.
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return format_it(bound.arguments)

    return key


def roots_of(template: str) -> Iterator[str]:
    """Yield the arguments in a template, including arguments in a field's format."""
    for _, field, form, _ in string.Formatter().parse(template):
        if field is not None:
            yield field.partition(".")[0].partition("[")[0]
            yield from roots_of(form or "")


class _Template:
    """Make keys from the values of a template."""

    def __init__(self, template: str) -> None:
        self.format_map = template.format_map
        #: Per field: the text before; the field; whether the value counts as text (a field with format or conversion); the
        #: field as written.
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
        #: Whether text lies between all fields, so that a key can be split into its values.
        self.splits = splits
        self.name = self.fields[0][1] if len(self.fields) == 1 and not self.fields[0][2] else None

    def key(self, values: Mapping[str, Any]) -> str:
        text = self.format_map(values)
        if self.name is not None and self.name in values:
            # Fast path: the usual template has one field, an argument.
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

    def _is_plain(self, value: tuple[str, str], field: tuple[str, str, bool, str]) -> bool:
        tag, text = value
        return (tag in "it" or (tag == "s" and _looks_like_text(text))) and self.between.isdisjoint(text)


def _looks_like_text(text: str) -> bool:
    """Return whether no int has this text."""
    return not (text[-1:].isdigit() and _INT.fullmatch(text))


def text_key(text: str) -> str:
    """Return the key of a text; a `TypedKey` if the text looks like an int or can't be encoded."""
    return text if _looks_like_text(text) and _can_be_encoded(text) else TypedKey.of(text, [("s", text)])


def checked_key(key: object) -> str:
    """Check a key from a callable or a message.

    Raises:
      TypeError: The key is neither a non-empty str nor an int.
    """
    if isinstance(key, str) and key:
        return text_key(str(key))
    if type(key) is int:
        return str(key)
    # The key is made of arguments, so the value must not reach a log.
    got = "an empty key" if key == "" else f"a {type(key).__name__}"
    raise TypeError(f"idempotency_key: expected a non-empty str or an int, got {got}")
