"""People's programs beside ours: what was measured is what the page says."""

import json

from conftest import ROOT

from bench.clients import CLIENTS, table


def test_table_of_the_page_is_the_committed_result():
    found = json.loads((ROOT / "bench/results/clients.json").read_text())
    assert found.keys() <= CLIENTS.keys() and not [said for said in found.values() if "failed" in said]
    page = (ROOT / "docs/use_it_elsewhere.md").read_text()
    assert "\n".join(table(found)) in page
