"""The judges of `make chaos`: the losses to find, and the losses to excuse."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dramatiq import Message

from tests.chaos import orders
from tests.chaos.ledger import Freeze, Ledger, Verdict, judge


@pytest.fixture
def verdict(tmp_path: Path) -> Any:
    def of(*lines: str, freezes: tuple[Freeze, ...] = (), letters: tuple[Any, ...] = ()) -> Verdict:
        path = tmp_path / "ledger"
        path.write_text("".join(f"{line}\n" for line in lines))
        return judge(Ledger.read(path), ["plain:1"], [], letters, freezes)

    return of


def run(name: str, since: float, *, process: int = 1, concluded: bool = True) -> list[str]:
    lines = [f"{since} {process} begin {name} plain:1 id-{name} 1", f"{since + 0.1} {process} effect {name}"]
    if concluded:
        lines += [
            f"{since + 0.2} {process} end {name}",
            f"{since + 0.3} {process} outcome {name} plain id-{name} success -",
        ]
    return lines


def test_a_complete_run_passes(verdict: Any) -> None:
    assert verdict(*run("a", 1.0)).wrong == {}


def test_a_job_without_an_effect_is_lost(verdict: Any) -> None:
    assert verdict("1.0 1 begin a plain:1 id-a 1").wrong == {"lost": ["plain:1"]}


def test_two_whole_runs_have_no_excuse(verdict: Any) -> None:
    found = verdict(*run("a", 1.0), *run("b", 2.0))
    assert found.wrong == {"excess": ["plain:1"], "doubled": ["1 > 0"]}


def test_two_runs_side_by_side_have_no_excuse(verdict: Any) -> None:
    assert "beside" in verdict(*run("a", 1.0), *run("b", 1.05, process=2)).wrong


def test_a_run_that_a_kill_cut_short_excuses_the_next(verdict: Any) -> None:
    found = verdict(*run("a", 1.0, concluded=False), *run("b", 2.0))
    assert (found.wrong, found.doubled, found.bound) == ({}, 1, 1)


def test_a_freeze_excuses_the_runs_of_its_process_alone(verdict: Any) -> None:
    lines = [*run("a", 1.0, process=1), *run("b", 2.0, process=2)]
    assert verdict(*lines, freezes=(Freeze(1, 1.0, 1.2),)).wrong == {}
    assert verdict(*lines, freezes=(Freeze(3, 1.0, 1.2),)).wrong != {}


def test_lost_keys_of_the_store_excuse_the_runs_of_that_time_in_all_processes(verdict: Any) -> None:
    lines = [*run("a", 1.0, process=1), *run("b", 2.0, process=2)]
    assert verdict(*lines, freezes=(Freeze(None, 0.9, 1.2),)).wrong == {}
    assert verdict(*lines, freezes=(Freeze(None, 5.0, 6.0),)).wrong != {}


def test_a_dead_letter_without_a_result_is_excused_where_the_store_lost_some_and_the_first_message_moved_on(
    verdict: Any,
) -> None:
    failure = {"outcome": "dead", "reason": "no_result"}
    letter = Message("jobs", "first", (1,), {}, {"failure": failure})
    moved_on = [line.replace("plain:1", "second:1") for line in run("b", 1.0)]
    lines, lost_some = run("a", 1.0), (Freeze(None, 0.0, 0.5),)
    assert verdict(*lines, *moved_on, letters=(letter,), freezes=lost_some).wrong == {}
    assert "dead" in verdict(*lines, *moved_on, letters=(letter,)).wrong
    assert "dead" in verdict(*lines, letters=(letter,), freezes=lost_some).wrong


# Transactional jobs: nothing is excused.


def verdict_of(*more: str, without: str = "", letters: tuple[str, ...] = ("hopeless:3",)) -> dict[str, Any]:
    made = Counter([name for number in range(10) for name in orders.effects_of(number) if name != without])
    found = []
    for letter in letters:
        actor, number = letter.split(":")
        found.append(Message("jobs", actor, (int(number),), {}, {"failure": {"reason": "exhausted"}}))
    return orders.judge(range(10), made + Counter(more), found).wrong


def test_each_effect_of_each_order_once_is_well() -> None:
    assert verdict_of() == {}


@pytest.mark.parametrize("name", ["flaky:2", "child:5", "member:1002", "together:1", "second:0"])
def test_an_effect_too_few_and_an_effect_too_many_have_no_excuse(name: str) -> None:
    assert verdict_of(without=name) == {"lost": [name]}
    assert verdict_of(name) == {"excess": [name], "doubled": ["1 > 0"]}


@pytest.mark.parametrize("name", ["never:4", "hopeless:3", "plain:11"])
def test_an_effect_of_a_rollback_has_no_excuse(name: str) -> None:
    assert verdict_of(name) == {"excess": [name]}


def test_a_dead_letter_too_few_and_one_too_many_are_found() -> None:
    assert verdict_of(letters=()) == {"dead": ["no letter of hopeless:3"]}
    assert verdict_of(letters=("hopeless:3", "plain:7")) == {"dead": ["plain:7 exhausted"]}
