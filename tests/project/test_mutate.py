"""`make mutants` names modules and tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

import dramatiq_policies
from scripts.mutate import TESTS, file_of, files_of, modules_of, row_of


@pytest.mark.parametrize("name", TESTS)
def test_each_module_and_its_tests_are_there(name):
    assert modules_of(name)
    for module in modules_of(name):
        assert (Path(dramatiq_policies.__file__).parent.parent / file_of(module)).is_file()
        assert len(files_of(row_of(module))) >= 1


def test_a_name_without_tests_is_an_error():
    with pytest.raises(SystemExit, match="no tests of the name rules/test_nothing"):
        files_of(["rules/test_nothing"])
