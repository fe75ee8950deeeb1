"""Five kills of tests/chaos.py, which can do a hundred: a resumed run ends as if nothing had been, bit for bit."""

import pytest
from chaos import WHOM, chaos

KILLS = {"one process": 2, "two ranks": 2, "two hosts": 1}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOM)
def test_killed_runs_end_as_the_one_that_was_left_alone(corpus, tmp_path, kind):
    chaos(kind, corpus, tmp_path, KILLS[kind], seed=1)
