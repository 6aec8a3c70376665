"""Every setting is declared once, and everything that is known of it comes from there."""

import dataclasses

import pytest

from capacity_gap.cell import pipeline
from capacity_gap.cell.config import RunConfig
from capacity_gap.commands.settings_help import settings_help, settings_page
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.records.record import columns, parting_columns, repeat_parting_columns, setting_columns
from capacity_gap.settings.declare import declared, default_of, setting, validate, walk
from capacity_gap.settings.errors import ConfigError
from capacity_gap.training.train_config import TrainConfig
from tests.conftest import ROOT, compose

ALL = list(walk(RunConfig))


def test_every_field_of_every_section_is_declared_and_says_what_it_is_for():
    owners = [RunConfig, *(s for d in ALL if (s := d.section))]
    for owner in owners:
        undeclared = {f.name for f in dataclasses.fields(owner)} - {f.name for f, _ in declared(owner)}
        assert undeclared == set(), owner
    unclear = [d.key for d in ALL if not d.setting.meaning.endswith(".") or len(d.setting.meaning) < 5]
    assert unclear == []


def test_defaults_are_allowed():
    for known in ALL:
        names = known.setting.names
        assert names is None or known.default is None or known.default in names, known.key


def test_what_a_column_tells_is_a_column():
    assert {d.setting.column for d in ALL if d.setting.column} <= columns().keys()
    own = [d.setting.column for d in ALL if d.setting.column and not d.setting.computed]
    assert sorted(own) == sorted(setting_columns()), "two settings would overwrite each other's column"


def test_a_column_that_is_computed_from_settings_is_described_before_anything_runs():
    config = compose(
        ["adapt.data=10k", "instruct.count=5", "prefer.count=5", "prune.init=pretrained", "prune.init_data=1k"]
    )
    known = pipeline.resolve(config).description.keys()
    measured = {"held_out_tokens", "metrics"}
    assert {d.setting.column for d in ALL if d.setting.computed} - measured <= known


def test_numbers_that_order_the_columns_that_part_curves_differ():
    given = [c.parts for c in columns().values() if c.parts is not None]
    assert len(given) == len(set(given)) == len(parting_columns())
    repeats = [c.parts_repeats for c in columns().values() if c.parts_repeats is not None]
    assert len(repeats) == len(set(repeats)) == len(repeat_parting_columns())


def test_the_columns_that_part_curves_keep_their_order():
    """Curves are sorted by them, and bootstrap draws follow: another order is other published intervals."""
    assert " ".join(parting_columns()) == (
        "family corpus init start start_tokens reference shape prune_method prune_priority prune_layers prune_steps "
        "teacher_data kd_weight temperature signal skew hidden_weight objective expanded_vocab adapt_tokens settings "
        "precision epochs batch data_tokens"
    )
    assert " ".join(repeat_parting_columns()) == (
        "learning_rate threads teacher_tokens held_out_tokens instruct_rows instruct_epochs instruct_learning_rate "
        "instruct_batch instruct_lora_rank instruct_replay instruct_settings prefer_rows prefer_epochs "
        "prefer_learning_rate prefer_batch prefer_lora_rank prefer_beta"
    )


OWNERS = [RunConfig, *dict.fromkeys(s for d in ALL if (s := d.section))]
NUMBERS = [(owner, f.name) for owner in OWNERS for f, _ in declared(owner) if isinstance(default_of(f), float)]


@pytest.mark.parametrize(("owner", "name"), NUMBERS)
def test_no_number_may_be_infinite(owner, name):
    some = owner()
    setattr(some, name, float("inf"))
    with pytest.raises(ConfigError, match="is out of range"):
        validate("section", some)


@pytest.mark.parametrize(
    ("known", "value", "allowed"),
    [
        ({"above": 0}, 0, "more than zero"),
        ({"least": 0}, -1, "zero or more"),
        ({"least": 1}, 0, "1 or more"),
        ({"least": 0, "most": 1}, 2, "0 to 1"),
        ({"least": 0, "below": 1}, 1, "0 to less than 1"),
        ({"above": 0, "below": 1}, 1, "between 0 and 1"),
        ({}, float("nan"), "a finite number"),
    ],
)
def test_ranges_in_words(known, value, allowed):
    made = dataclasses.make_dataclass("Some", [("x", float, setting(0.5, "Something.", **known))])
    with pytest.raises(ConfigError, match=rf"part\.x={value} is out of range\. Allowed: {allowed}\."):
        validate("part", made(x=value))


def test_a_new_setting_with_a_column_needs_its_declaration_alone():
    """It is hashed and recorded without another file that names it."""
    from capacity_gap.cell.nondefault import setting_columns as told
    from capacity_gap.settings.hashing import identity_fields

    made = dataclasses.make_dataclass(
        "Distill", [("margin", float, setting(0.0, "Of something new.", column="margin", if_set=True, parts=155))],
        bases=(DistillConfig,),
    )  # fmt: skip
    given = RunConfig(distill=made(margin=0.25))
    assert told(given)["margin"] == 0.25 and "margin" not in told(RunConfig(distill=made()))
    assert identity_fields(made(margin=0.25))["margin"] == 0.25


def test_help_and_page_name_every_setting():
    text, page = settings_help("python run.py"), settings_page()
    for known in ALL:
        if not known.section:
            assert f"  {known.key}=" in text and f"| `{known.key}` |" in page, known.key
    assert max(map(len, text.splitlines())) <= 120
    assert page == (ROOT / "docs/settings.md").read_text(), "make docs writes it again"


def test_the_same_optimiser_has_other_defaults_for_students():
    assert (TrainConfig().batch_size, TrainConfig().warmup) == (None, None), "the recipe's"
