"""A few of the inputs of `python tests/fuzz.py --minutes N`, the same ones each time."""

import fuzz
import pytest


@pytest.mark.parametrize("name, count", [("archive", 60), ("csv", 120), ("audio", 120), ("scores", 150), ("report", 6)])
def test_broken_input_gives_nothing_but_the_programs_own_errors(name, count):
    fuzz.search(name, count)
