"""What a joint.json says of the rungs of a ladder: an optimum, or a break-even budget alone. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from capacity_gap.cell.config import RunConfig
from capacity_gap.fit.joint_curve import JointCurve
from capacity_gap.fit.joint_fit import Answers, BreakEven
from capacity_gap.report.advice import (
    EXTRAPOLATES,
    NEAR,
    Ask,
    Recommendation,
    Rung,
    answer,
    between,
    made_on,
    other_family,
    short,
    with_range,
)
from capacity_gap.settings.declare import walk
from capacity_gap.wording.fit_words import ESTABLISHED
from capacity_gap.wording.intervals import span

LIKE = math.log(1.5)  # rungs this close to two compared teachers stand for them
FAR = math.log(10.0)  # beyond the sizes and budgets of a fit: what is said there is a guess
UNLIKELY = 0.2  # probability that a rung beyond the teachers of a fit is the best, up to which one inside is taken
SMALL = "no larger than the student"
GUESS = "GUESS: "
NEARER = "Nothing is recommended so far from the fit."


def by_joint(ask: Ask, held: Mapping[str, Any], told: list[str]) -> Recommendation | None:
    """The answer of the model of all cells, or None where it established nothing.

    Each rung's probability of being best is given only with an optimum, and within a factor of ten of the sizes and
    budgets that were fitted.

    Args:
        ask: the question.
        held: the content of a joint.json.
        told: what is to be said first.
    """
    answers = Answers(JointCurve.from_dict(held["model"]))
    if held["axis"] != "teacher_loss":  # whose sizes are not those of the ladder
        ask = with_range(ask, min(answers.curve.rungs.values()), max(answers.curve.rungs.values()))
    away, warnings = _outside(ask, answers.curve, held.get("budget"))
    warnings += other_family(ask, held["families"])
    guess = GUESS if away > FAR else ""
    told = [*told, _made_on(held, answers.curve)]
    if held["status"] in ESTABLISHED:
        return _by_optimum(ask, answers, held, told, warnings, guess)
    if held["status"] == "break_even":
        return _by_break_even(ask, answers, told, warnings, guess)
    return None


def _made_on(held: Mapping[str, Any], curve: JointCurve) -> str:
    """On what the fit was made, with the settings on which its answers depend."""
    students = between(*(math.exp(end + curve.means[0]) for end in curve.n_span))
    teachers = between(*(math.exp(pick(curve.rungs.values())) for pick in (min, max)))
    tokens = [held["budget"]] if held.get("budget") else []
    tokens = [math.exp(end + curve.means[1]) for end in curve.d_span] if "d" in curve.terms else tokens
    settings = {d.setting.column: d.key for d in walk(RunConfig) if d.setting.column and not d.section}
    more = [f"{settings.get(name, name)}={value}" for name, value in held.get("conditions", {}).items()]
    cells = f"{held['cells']} cells: " if "cells" in held else ""
    said = [f"{cells}students of {students} parameters", f"teachers of {teachers}"]
    return made_on(said, tokens, held["families"], more)


def _outside(ask: Ask, curve: JointCurve, budget: float | None) -> tuple[float, list[str]]:
    """How far beyond the fit the question lies (log), and in what."""
    n, d = math.log(ask.student_count) - curve.means[0], math.log(ask.tokens) - curve.means[1]
    asked = {"student": (n, curve.n_span, curve.means[0], "parameters")}
    if "d" in curve.terms:
        asked["budget"] = (d, curve.d_span, curve.means[1], "tokens")
    if "d" not in curve.terms and budget:
        one = math.log(budget)
        asked["budget"] = (math.log(ask.tokens), (one, one), 0.0, "tokens")
    tried = sorted(curve.rungs.values())
    farthest, said = 0.0, []
    for what, (x, (low, high), mean, unit) in asked.items():
        far = max(low - x, x - high)
        farthest = max(farthest, far)
        if far > 0.03:
            span = between(math.exp(low + mean), math.exp(high + mean))
            said.append(
                f"{EXTRAPOLATES}: the {what} lies {short(math.exp(far))} times beyond the {span} {unit} of the fit"
            )
    if (far := max(tried[0] - float(ask.x[-1]), float(ask.x[0]) - tried[-1])) > NEAR:
        farthest = max(farthest, far)
        span = between(math.exp(tried[0]), math.exp(tried[-1]))
        said.append(f"{EXTRAPOLATES}: no rung is among the teachers of {span} parameters that were tried")
    return farthest, said


def _by_optimum(
    ask: Ask, answers: Answers, held: Mapping[str, Any], told: list[str], warnings: list[str], guess: str
) -> Recommendation:
    low, high = min(answers.curve.rungs.values()), max(answers.curve.rungs.values())
    able = [r for r, x in zip(ask.rungs, ask.x, strict=True) if not r.note and low - FAR <= x <= high + FAR]
    if not able:
        return answer(
            ask,
            "joint",
            None,
            ask.rungs,
            [*told, "No rung that can hold the student is near the teachers of the fit."],
            warnings,
        )
    # A rung that was tried has its own effect, and its size as the fit counts it; names of other families say nothing.
    tried = answers.curve.rungs if ask.family.name in held["families"] else {}
    same = {r.name for r in able if r.name in tried and (held["axis"] == "teacher_loss" or _as_tried(ask, r, tried))}
    sizes = {r.name if r.name in same else f"{r.name} (new)": r.ratio * ask.student_count for r in able}
    sizes |= {name: math.exp(tried[name]) for name in same}
    best = answers.best_teacher(ask.student_count, float(ask.tokens), rungs=sizes)
    findings = [*told, f"{guess}The model of all cells ({held['status']}) puts the best teacher at {_size(best)}."]
    if held["rests_on"]:
        findings.append(f"That rests on the rung {' and '.join(held['rests_on'])}: without it there is no optimum.")
    if guess:
        return answer(ask, "joint", None, ask.rungs, [*findings, NEARER], warnings)
    if not any(best.interval[0] <= size <= best.interval[1] for size in sizes.values()):
        findings.append("No rung lies in that range: probabilities and regret compare the rungs of this ladder alone.")
    known, regret = ({k.removesuffix(" (new)"): v for k, v in x.items()} for x in (best.probabilities, best.regret))
    inside = [r.name for r in able if r.name in regret and not r.beyond] or list(regret)
    first = min(inside, key=lambda name: regret[name])
    findings += _off_size(ask, first, best.params, {name: math.log(sizes[name]) for name in same})
    doubts = [_doubt(held), _past(best.params, known, inside, (low, high))]
    rungs = [replace(r, probability=known[r.name], regret=regret[r.name]) if r.name in known else r for r in ask.rungs]
    rungs = [replace(r, note=SMALL) if r in able and r.name not in known else r for r in rungs]
    return answer(ask, "joint", first, rungs, findings, warnings, doubt="; ".join(filter(None, doubts)))


def _off_size(ask: Ask, first: str, params: float, tried: Mapping[str, float]) -> list[str]:
    """Why a rung is taken though another is nearer to the best size, or that this is below the student."""
    if not math.isfinite(params):
        return []
    if params < ask.student_count:
        return ["That is smaller than the student: the smallest rungs that can hold it are nearest."]
    nearest = min(tried, key=lambda name: abs(tried[name] - math.log(params)), default=first)
    if nearest == first or first not in tried:
        return []
    return [f"{first} did better in the fit than its size says, or {nearest}, which is nearer to that size, did worse."]


def _past(params: float, chances: Mapping[str, float], inside: Sequence[str], span: tuple[float, float]) -> str:
    """Whether the best teacher may well be larger than all that were tried; empty where that is unlikely."""
    beyond = sum(chance for name, chance in chances.items() if name not in inside)
    if beyond < UNLIKELY and not (math.isfinite(params) and math.log(params) > span[1] + NEAR):
        return ""
    return f"the best teacher may be larger than those of the fit: P is {beyond:.0%} for such rungs of this ladder"


def _doubt(held: Mapping[str, Any]) -> str:
    """Why an optimum is provisional; empty where it is not."""
    if held["status"] != "provisional":
        return ""
    if held["rests_on"]:
        return f"provisional: without the rung {' and '.join(held['rests_on'])} there is no optimum"
    return "provisional: the fit has too few students for a law"


def _as_tried(ask: Ask, rung: Rung, tried: Mapping[str, float]) -> bool:
    return abs(math.log(rung.ratio * ask.student_count) - tried[rung.name]) < NEAR


def _size(best: Any) -> str:
    """The best teacher's parameters with their set."""
    if not math.isfinite(best.params):
        return "no size inside what was tried"
    return f"{short(best.params)} parameters (95 % {span(best.interval, short)})"


def _by_break_even(ask: Ask, answers: Answers, told: list[str], warnings: list[str], guess: str) -> Recommendation:
    """Which of two teachers, by the tokens that there are; all in tokens."""
    curve = answers.curve
    ends = [math.exp(curve.rungs[name]) for name in curve.shared]
    pair = [_nearest(ask, size) for size in ends]
    small, large = (r.ratio * ask.student_count for r in pair)
    apart = [abs(math.log(x / size)) for x, size in zip((small, large), ends, strict=True)]
    if max(apart) > LIKE or any(r.note for r in pair):
        tried = " and ".join(short(size) for size in ends)
        said = f"The fit compared teachers of {tried} parameters; this ladder has no two rungs near these."
        return answer(ask, "joint", None, ask.rungs, [*told, said], warnings)
    even = answers.break_even(ask.student_count, small, large)
    findings = [*told, f"{guess}{_said(even, pair)}", "Nothing was established of rungs between or beyond the two."]
    if guess:
        return answer(ask, "joint", None, ask.rungs, [*findings, NEARER], warnings)
    if not even.established:
        return answer(ask, "joint", None, ask.rungs, findings, warnings)
    low, high = even.interval
    if low <= ask.tokens <= high:
        findings.append(f"{short(ask.tokens)} tokens lie within that range: neither can be recommended over the other.")
        return answer(ask, "joint", None, ask.rungs, findings, warnings)
    chosen = pair[0] if ask.tokens < low else pair[1]
    return answer(ask, "joint", chosen.name, ask.rungs, findings, warnings)


def _nearest(ask: Ask, size: float) -> Rung:
    return min(ask.rungs, key=lambda r: abs(math.log(r.ratio * ask.student_count / size)))


def _said(even: BreakEven, pair: list[Rung]) -> str:
    small, large = (r.name for r in pair)
    if not math.isfinite(even.tokens):
        return f"Between the budgets of the fit the order of {small} and {large} does not change."
    sure = f"95 % {span(even.interval, short)}" if even.established else "not established"
    return f"Above {short(even.tokens)} tokens ({sure}) {large} is the better teacher, below it {small}."
