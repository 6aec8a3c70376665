"""The table of what preferences add recovers planted gains, and their difference with its interval."""

import pandas as pd
import pytest

from benchmarks.preferences import gains, table


def _frame():
    rows = []
    for teacher, params, loss, gain in (("180k", 2e5, 3.0, 0.30), ("900k", 1e6, 3.2, 0.10)):
        for seed, noise in enumerate((-0.02, 0.0, 0.02)):
            row = {"teacher": teacher, "teacher_params": params, "seed": seed, "student_loss": loss + noise}
            row["teacher_loss"] = 2.9 - params / 1e7
            for name, share in (("exact_match", 0.5), ("preference", 1.0), ("log_ratio", 2.0)):
                row[f"metrics/{name}/instruct"] = 0.4
                row[f"metrics/{name}/prefer"] = 0.4 + share * (gain + noise)
            rows.append(row)
    return pd.DataFrame(rows)


def test_planted_gains_come_back():
    found = table(gains(_frame())).set_index("teacher")
    assert list(found.index) == ["180k", "900k", "180k − 900k"]
    assert found.loc["180k", "gain_preference"] == pytest.approx(0.30)
    assert found.loc["900k", "gain_exact_match"] == pytest.approx(0.05)
    assert found.loc["180k", "gain_preference_half_width"] == pytest.approx(0.02 / 3**0.5 * 4.302653, rel=1e-5)
    difference = found.loc["180k − 900k"]
    assert difference["gain_preference"] == pytest.approx(0.20)
    assert difference["gain_preference_half_width"] == pytest.approx(0.0, abs=1e-12), "the seeds' noise is paired"
