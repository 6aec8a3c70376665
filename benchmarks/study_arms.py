"""The arms of the pico study: what was changed, the cells, and their fits, each made once."""

from dataclasses import dataclass, field

import pandas as pd

from capacity_gap.fit.frame import curves
from capacity_gap.fit.law import law_from
from capacity_gap.fit.law_fit import LawFit
from capacity_gap.fit.optimum import Located, locate

MAIN = {
    "family": "pico",
    "corpus": "embedded",
    "init": "pruned",
    "reference": "",
    "shape": "common",
    "teacher_data": "1m",
    "kd_weight": 0.5,
}
SAID = {
    "init": "{} start",
    "reference": "cut from {}",
    "teacher_data": "teachers at {} tokens",
    "kd_weight": "KD weight {}",
    "shape": "shape {}",
    "corpus": "corpus {}",
    "family": "{}",
}


@dataclass
class Arm:
    """Cells that differ from the main arm in the settings `differs`. Pruning alone is an arm of its own."""

    name: str
    differs: frozenset[str]
    frame: pd.DataFrame
    fits: dict[tuple, tuple[Located, LawFit]] = field(default_factory=dict)

    @property
    def budgets(self) -> list[int]:
        """Distillation tokens, smallest first."""
        return sorted(int(n) for n in self.frame["data_tokens"].unique())

    @property
    def suffix(self) -> str:
        """For file names."""
        return "_" + self.name.replace(",", "").replace(" ", "_") if self.differs else ""

    @property
    def law(self) -> LawFit:
        """The fit of all its budgets at once."""
        return self._fit("all", "total", "asymmetric")[1]

    @property
    def located(self) -> Located:
        """Its curves and their optima."""
        return self._fit("all", "total", "asymmetric")[0]

    def fit(self, tokens: int | str = "all", axis: str = "total", method: str = "asymmetric") -> LawFit:
        """The law at one budget, or at all of them."""
        return self._fit("all" if [tokens] == self.budgets else tokens, axis, method)[1]

    def _fit(self, tokens: int | str, axis: str, method: str) -> tuple[Located, LawFit]:
        if (tokens, axis, method) not in self.fits:
            part = self.frame if tokens == "all" else self.frame[self.frame["data_tokens"] == tokens]
            found, notes = curves(part, axis=axis)
            located = locate(found, method=method)
            self.fits[tokens, axis, method] = located, law_from(located, axis=axis, notes=notes)
        return self.fits[tokens, axis, method]


def arms_of(frame: pd.DataFrame) -> list[Arm]:
    """The arms with a teacher in them, the main one first; direct training has no curve and so is not an arm."""
    taught = frame[(frame["kd_weight"] > 0) & (frame["seed"].eq(frame["teacher_seed"]))]
    found = []
    for (_, *key), cells in taught.groupby([taught["data_tokens"] > 0, *MAIN], sort=False):
        differs = {k: v for k, v in zip(MAIN, key, strict=True) if v != MAIN[k]}
        name = ", ".join(SAID[k].format(v) for k, v in differs.items()) or "main"
        found.append(Arm(name, frozenset(differs), cells.reset_index(drop=True)))
    return sorted(found, key=lambda a: (len(a.differs), a.name, a.budgets != [0]))


def main_of(arms: list[Arm]) -> Arm:
    """The main arm, distilled."""
    return next(a for a in arms if not a.differs and a.budgets != [0])
