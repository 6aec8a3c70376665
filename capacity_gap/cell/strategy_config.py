"""How a grid chooses its cells: all of them, or in rounds those that narrow an answer most."""

from dataclasses import dataclass

from capacity_gap.settings.declare import setting, validate
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.scales import parse_scale, parse_tokens

FACTORIAL, ADAPTIVE = "factorial", "adaptive"
STRATEGIES = (FACTORIAL, ADAPTIVE)
GOALS = {"law": (), "target": ("student", "data"), "break_even": ("student", "small", "large")}


@dataclass
class NextConfig:
    """What strategy=adaptive estimates."""

    goal: str = setting(
        "law",
        "law: the ratio of the best teacher to its student; target: the best teacher at next.student and next.data; "
        "break_even: the budget of next.student above which the teacher next.large beats next.small.",
        allowed=tuple(GOALS),
        decides=False,
    )
    student: str | None = setting(None, "goal=target or break_even: the student's number of parameters.", decides=False)
    data: str | None = setting(None, "goal=target: the student's token budget.", decides=False)
    small: str | None = setting(None, "goal=break_even: parameters of the smaller teacher.", decides=False)
    large: str | None = setting(None, "goal=break_even: parameters of the larger teacher.", decides=False)
    k: int = setting(6, "Cells per round.", least=1, most=10_000, decides=False)

    def __post_init__(self) -> None:
        validate("next", self)
        needs = GOALS.get(self.goal, ())
        for name in ("student", "data", "small", "large"):
            if (getattr(self, name) is None) == (name in needs):
                what = f"next.{name} is missing" if name in needs else f"next.{name} does not apply"
                takes = (
                    ", ".join(f"next.{n}" for n in needs) or "none of next.student, next.data, next.small, next.large"
                )
                raise ConfigError(f"next.goal={self.goal}: {what}. It takes {takes}.")

        sizes = self.sizes
        if self.goal == "break_even" and not sizes["small"] < sizes["large"]:
            raise ConfigError(f"next.small={self.small} is not below next.large={self.large}. Exchange or change them.")

    @property
    def sizes(self) -> dict[str, float]:
        """What the goal is about, read: student_params, data_tokens, small, large."""
        found: dict[str, float] = {}
        if self.student:
            found["student_params"] = parse_scale(self.student, key="next.student")
        if self.data:
            student = int(found["student_params"])
            found["data_tokens"] = parse_tokens(self.data, params=student, key="next.data")
        for name in ("small", "large"):
            if given := getattr(self, name):
                found[name] = parse_scale(given, key=f"next.{name}")
        return found
