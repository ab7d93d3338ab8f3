"""Texts from anybody: encodable where they are taken, and nothing that a log or a terminal obeys where they are written."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest

from dramatiq_policies.common.texts import encodable, encodable_all, printable
from dramatiq_policies.delivery.decision import Decision
from dramatiq_policies.delivery.history import History, failure_of
from dramatiq_policies.observability.statsd import metric_name, tag_list
from dramatiq_policies.outcomes import Outcome, text_of

HALF = "\ud83d"


def raised(error):
    try:
        raise error
    except Exception as caught:
        return caught


def test_half_a_character_is_spelt_out_and_every_other_text_is_itself():
    assert encodable(f"can't say {HALF}") == r"can't say \ud83d"
    for text in ("", "plain", "naïve 東京 \U0001f600", "a\nb"):
        assert encodable(text) == text
        assert encodable_all({text: [text, (text, 1)]}) == {text: [text, [text, 1]]}
    assert encodable_all({HALF: {"vars": {"kept": HALF}}}) == {r"\ud83d": {"vars": {"kept": HALF}}}


def test_a_dead_letter_is_encodable_after_any_error():
    error = raised(ValueError(HALF))
    history = History({})
    history.failed(error, 1, None)
    options = {"policies": history.option()}
    failure = failure_of(Decision(Outcome.DEAD, exception=error), options, {"team": HALF})
    json.dumps(failure, ensure_ascii=False).encode("utf-8")
    said = (failure["message"], failure["traceback"], failure["tags"]["team"], failure["history"][0]["message"])
    assert all(r"\ud83d" in text for text in said)
    assert text_of(error) == r"\ud83d"


def test_no_control_character_is_printable_and_every_letter_is():
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        kind = unicodedata.category(char)
        if kind in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(char) in (
            *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
        ):
            assert printable(char).isascii(), hex(code)
            assert printable(char).startswith("\\"), hex(code)
        elif kind[0] in "LMNPS" or char == " ":
            assert printable(char) == char, hex(code)


def test_the_marks_that_turn_a_texts_direction_are_spelt_out():
    assert printable("\u200e\u200f\u061c") == r"\u200e\u200f\u061c"


def test_a_text_is_one_line_unless_it_has_lines_by_nature():
    assert printable("a\nb\r\n\tc\x85d\u2028e") == r"a\nb\r\n\tc\x85d\u2028e"
    assert printable("a\nb\r\n\tc\x85d\u2028e", lines=True) == "a\nb\\r\n\tc\\x85d\\u2028e"


@pytest.mark.parametrize("text", ["a\nb:1|c", "a|c", "a:b", HALF, "\u202e", "a b", "\x1b[2J"])
def test_a_name_forges_no_metric(text):
    assert not set(metric_name(text)) & set("\n|: \x1b\u202e\ud83d")
    (tag,) = tag_list({"actor": text})
    assert not set(tag) & set("\n|, \x1b\u202e\ud83d")
