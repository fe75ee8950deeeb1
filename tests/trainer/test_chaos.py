"""Five kills of tests/chaos.py, which can do a hundred: a resumed run ends as if nothing had been, bit for bit."""

import pytest
from chaos import chaos

KILLS = {  # each moment, and each that can be killed; of two hosts the first has the rendezvous
    "one process": [("evaluation", "all"), ("save", "all")],
    "two ranks": [("growth", "a rank"), ("save", "all")],
    "two hosts": [("train", "host 0")],
}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLS)
def test_killed_runs_end_as_the_one_that_was_left_alone(corpus, tmp_path, kind):
    chaos(kind, corpus, tmp_path, KILLS[kind], seed=1)
