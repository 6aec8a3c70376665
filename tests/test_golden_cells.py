"""Cells of every sweep and family, sixty of the published study among them, keep their identities."""

import csv
import json

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from capacity_gap.cell import config, pipeline
from hydra_plugins.capacity_gap_grid.grid_sweeper import Composer
from tests.conftest import ROOT

GOLDEN = json.loads((ROOT / "tests/golden_cells.json").read_text())


def test_cells_keep_their_identities():
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        base = compose("config", return_hydra_config=True)
        composed = Composer(base, GlobalHydra.instance().config_loader())  # as a grid does: Hydra itself takes long
        found = {
            overrides: pipeline.resolve(config.from_hydra(composed(overrides.split()))).record.digest
            for overrides in GOLDEN
        }
    assert found == GOLDEN


def test_sixty_cells_of_the_published_study_are_among_them():
    published = set()
    for table in (ROOT / "results/pico").glob("*.csv"):
        with table.open(encoding="utf-8", newline="") as rows:
            published |= {row["cell"] for row in csv.DictReader(rows)}
    assert len(published & set(GOLDEN.values())) == 60
