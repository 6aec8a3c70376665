"""The pages of the docs that are made from the code say what the code says."""

import argparse
import re

import pytest

from capacity_gap.commands import cli, reference
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.records.record import columns
from tests.conftest import ROOT


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_is_as_it_was_last_made(name, tmp_path):
    reference.main(tmp_path)
    assert (ROOT / "docs" / name).read_text() == (tmp_path / name).read_text(), "make docs writes it again"


def test_every_command_and_option_is_on_the_page():
    page = reference.commands_page()

    def check(parser, where):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, below in action.choices.items():
                    assert re.search(rf"^#+ {f'{where} {name}'.strip()}$", page, re.MULTILINE), name
                    check(below, f"{where} {name}".strip())
            elif action.dest not in ("help", "version", "overrides"):
                assert f"| `{(action.option_strings or [''])[-1]}" in page, (where, action.dest)

    check(cli.parser(), "")
    assert "None" not in page and str(ROOT) not in page


def test_every_column_and_every_rung_is_on_its_page():
    assert [name for name in columns() if f"| `{name}` |" not in reference.columns_page()] == []
    page = reference.families_page()
    for family in (FAMILIES[name] for name in FAMILIES if FAMILIES.entry(name).is_ours):
        section = page.partition(f"\n## `{family.name}`\n")[2].partition("\n## ")[0]
        for rung, params in family.params.items():
            assert f"| {rung} | {params:,} |" in section, (family.name, rung)
        assert all(f"`{repository}`" in section for repository in family.published.values())
