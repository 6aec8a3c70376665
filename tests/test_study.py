"""The published study says what its records say."""

from benchmarks import study
from tests.conftest import ROOT


def test_tables_of_the_page_are_those_of_the_records():
    page = (ROOT / "docs" / "study.md").read_text()
    assert study.filled(page, study.pages()) == page, "run `make study-figures`"


def test_a_cell_is_published_once():
    frame = study.load()
    assert frame["cell"].is_unique
    assert set(frame["status"]) == {"done"}


def test_the_published_fit_is_that_of_the_records():
    from capacity_gap.fit import LawFit

    kept = LawFit.from_json((study.RECORDS / "law.json").read_text())
    made = study.fit(study.load().query("data_tokens > 0"))[1]
    assert (kept.status, kept.ratio) == (made.status, made.ratio)
    assert [o.status for o in kept.optima] == [o.status for o in made.optima]
