"""The gates of the MiniChat table: what passes, and what must not."""

import copy
import math

import pytest

from benchmarks.minichat import failures


def _score(value, rows=300):
    return {"value": value, "stderr": math.sqrt(value * (1 - value) / rows), "shots": 0}


GOOD = {
    "expanded_vocab": 1536,
    "student_loss": 4.4,
    "tuned_loss": 4.7,
    "second_bytes_per_token_before": 1.0,
    "second_bytes_per_token": 2.4,
    "metrics": {
        "exact_match/constant": _score(0.257),
        "exact_match/base": _score(0.0),
        "exact_match/instruct": _score(0.45),
        "reward_margin/start": {"value": 0.0, "stderr": None},
        "reward_margin/end": {"value": 0.1, "stderr": None},
    },
}


def test_a_model_that_learnt_passes():
    assert failures(GOOD) == []


@pytest.mark.parametrize("value", [0.257, 0.317, 0.36])
def test_a_lookup_of_constant_answers_does_not_pass(value):
    """The commonest answer of each task and script is right for a quarter, and a model that never stops for none."""
    row = copy.deepcopy(GOOD)
    row["metrics"]["exact_match/instruct"] = _score(value)
    (missed,) = failures(row)
    assert missed == f"exact match: 0.257 for a constant per task and script, {value:.3f} after fine-tuning"


@pytest.mark.parametrize("loss", [5.1, math.log(1536), 7.9])
def test_a_model_that_forgot_its_language_does_not_pass(loss):
    (missed,) = failures({**GOOD, "tuned_loss": loss})
    assert missed == f"held-out loss: 4.400 distilled, {loss:.3f} tuned; a uniform guess has 7.337"
