"""The list of mutants follows the code: found by every run of the suite, not only by `make mutants`."""

from __future__ import annotations

import re

import pytest
from tests.mutants.__main__ import GROUPS
from tests.mutants.run import ROOT

ALL = [mutant for mutants in GROUPS.values() for mutant in mutants]

each_mutant = pytest.mark.parametrize("mutant", ALL, ids=[mutant.name for mutant in ALL])


@each_mutant
def test_what_a_mutant_replaces_stands_there_once(mutant):
    """A safeguard whose text has changed would be taken out of nothing."""
    for edit in mutant.edits:
        assert (ROOT / edit.file).read_text("utf-8").count(edit.old) == 1


@each_mutant
def test_the_tests_that_must_miss_it_are_in_the_suite(mutant):
    """A test that was renamed would be collected no more."""
    for test in mutant.tests:
        file, _, name = test.partition("::")
        if name:
            function = re.escape(name.rpartition("::")[2].partition("[")[0])
            assert re.search(rf"def {function}\(|{function} = ", (ROOT / file).read_text("utf-8")), test
        else:
            assert (ROOT / file).exists(), test
