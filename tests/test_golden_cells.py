"""Cells of every sweep and family, sixty of the published study among them, keep their identities."""

import csv
import json

import pytest

from capacity_gap import pipeline
from tests.conftest import ROOT, compose

GOLDEN = json.loads((ROOT / "tests/golden_cells.json").read_text())


@pytest.mark.parametrize("overrides", GOLDEN)
def test_a_cell_keeps_its_identity(overrides):
    assert pipeline.resolve(compose(overrides.split())).record.digest == GOLDEN[overrides]


def test_sixty_cells_of_the_published_study_are_among_them():
    published = set()
    for table in (ROOT / "results/pico").glob("*.csv"):
        with table.open(encoding="utf-8", newline="") as rows:
            published |= {row["cell"] for row in csv.DictReader(rows)}
    assert len(published & set(GOLDEN.values())) == 60
