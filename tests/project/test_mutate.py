"""`make mutants` names modules and tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

import dramatiq_policies
from scripts.mutate import TESTS, files_of


@pytest.mark.parametrize("module", TESTS)
def test_each_module_and_its_tests_are_there(module):
    assert (Path(dramatiq_policies.__file__).parent / f"{module}.py").is_file()
    assert len(files_of(TESTS[module])) >= 1


def test_a_name_without_tests_is_an_error():
    with pytest.raises(SystemExit, match="no tests of the name rules/test_nothing"):
        files_of(["rules/test_nothing"])
