"""Which rung of a ladder to distil a student from, as far as a fit allows one to say. Imports no torch.

A law gives draws of the best teacher, log N_T* = log r + b·log N_S; the flat intervals of its optima give the loss
around it, so every rung gets the probability that it is the best and the loss it is expected to give away. A surface
gives both at once. Where there is neither, each curve's own bounds say which rungs it rules out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from capacity_gap.models.accounting import forward_flops, non_embedding, train_flops
from capacity_gap.models.axes import config_with, dims
from capacity_gap.models.ladders import Family, Shape
from capacity_gap.pruning.common_shape import common_shape
from capacity_gap.pruning.shape import TOLERANCE, choose_shape, sized, unfit
from capacity_gap.report.advice import (
    EXTRAPOLATES,
    Ask,
    Recommendation,
    Rung,
    answer,
    between,
    made_on,
    other_family,
    scored,
    short,
    with_range,
)
from capacity_gap.report.joint_advice import by_joint
from capacity_gap.settings.errors import ConfigError, UserError
from capacity_gap.settings.places import RESULTS
from capacity_gap.settings.scales import format_scale
from capacity_gap.surfaces.surface import SurfaceFit
from capacity_gap.surfaces.teacher import FLAT_NATS, best_teacher
from capacity_gap.wording.intervals import span

PUBLISHED_FIT = RESULTS / "pico2" / "joint.json"
MADE_BY = {"joint.json": "--joint", "law.json": "--surface", "surface.json": "--surface"}  # options of `fit`
DRAWS = 4000  # where a law brings none of its own
Z = 1.96
NO_RATIO = f"{EXTRAPOLATES}: no rung has a ratio that was tested"

Array = np.ndarray


def read_fit(file: Path | None) -> tuple[dict[str, Any] | None, SurfaceFit | None, dict[str, Any] | None]:
    """The law, the surface and the model of all cells that a file offers; beside a law.json the other two are read.

    Raises:
        UserError: there is no such file, or it holds neither.
    """
    path = file or PUBLISHED_FIT
    if path.is_dir():
        path = next((path / name for name in ("law.json", "joint.json") if (path / name).is_file()), path / "law.json")
    if not path.is_file():
        what = f"--fit={path} does not exist"
        what = what if file else f"the published fit, {path.name} of results/{path.parent.name}, is not here"
        name = path.name if path.name in MADE_BY else "joint.json"
        raise UserError(
            f"{what}. Make one: `python -m capacity_gap fit STORE {MADE_BY[name]} --out DIR`, then `recommend … --fit "
            f"DIR/{name}`."
        )
    try:
        given = json.loads(path.read_text())
        if "form" in given:
            return None, SurfaceFit.from_json(path.read_text()), None
        if "model" in given:
            return None, None, _joint_of(given)
        law = {key: given[key] for key in ("status", "axis", "optima")} | given
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--fit={path} is no law.json, joint.json or surface.json, so nothing can be read from it "
            f"({type(error).__name__}). Name one that `python -m capacity_gap fit` wrote, or its folder."
        ) from error
    surface, joint = (path.with_name(name) for name in ("surface.json", "joint.json"))
    return (
        law,
        SurfaceFit.from_json(surface.read_text()) if surface.is_file() else None,
        _joint_of(json.loads(joint.read_text())) if joint.is_file() else None,
    )


def _joint_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """A joint.json with what is asked of it."""
    asked = ("status", "verdict", "rests_on", "ratio", "axis", "families", "model")
    return {key: given[key] for key in asked} | dict(given)


def recommend(
    family: Family,
    student_params: int,
    data_tokens: int,
    law: Mapping[str, Any] | None,
    surface: SurfaceFit | None,
    joint: Mapping[str, Any] | None = None,
) -> Recommendation:
    """Ranks the rungs of a ladder for one student: by the model of all cells if it established an optimum or a
    break-even budget, else the law, else the surface, else the bounds.

    Args:
        family: the ladder.
        student_params: total parameters of the student.
        data_tokens: distillation tokens.
        law: the content of a law.json.
        surface: an additive surface.
        joint: the content of a joint.json.
    """
    if surface is not None and surface.form not in ("additive", "additive_free"):
        raise UserError(
            f"recommend reads additive surfaces; this one is {surface.form}: use capacity_gap.surfaces.teacher."
        )
    axis = str(joint["axis"] if joint else law["axis"] if law else surface.axis if surface is not None else "total")
    ask = _question(family, student_params, data_tokens, axis)
    if joint and (found := by_joint(ask, joint, _against(joint, law))):
        return found
    told = [f"The model of all cells: {joint['verdict']}"] if joint else []
    if law is not None and law["status"] == "law":
        found = _by_law(ask, law)
        return replace(found, findings=(*told, *found.findings))
    told += [_no_law(law)] if law is not None else []
    if surface is not None and surface.parameters:
        return _by_surface(ask, surface, told)
    return _by_bounds(ask, law["optima"] if law is not None else [], told)


def _question(family: Family, student: int, tokens: int, axis: str) -> Ask:
    able = {r: n for r, n in family.params.items() if n >= student * (1 - TOLERANCE)}
    if not able:
        raise ConfigError(
            f"student={format_scale(student)} is larger than every rung of family {family.name}: "
            f"{' '.join(family.rungs)}. Take a smaller student, or another family."
        )
    shape, shared = _student_shape(family, student)
    count = non_embedding(shape) if axis == "non_embedding" else student
    rungs = []
    for name in sorted(able, key=lambda r: able[r]):
        teacher = family.rungs[name]
        size = non_embedding(teacher) if axis == "non_embedding" else able[name]
        flops = train_flops(shape, tokens) + forward_flops(teacher, tokens)
        note = "" if not shared or not unfit(shared, dims(teacher)) else "cannot hold the common student"
        rungs.append(Rung(name, able[name], size / count, flops, note=note))
    return Ask(family, student, tokens, axis, tuple(rungs), float(count))


def _student_shape(family: Family, student: int) -> tuple[Shape, Any]:
    """The student's config for counting FLOPs, and the shape common to all rungs, where there is one."""
    able = sorted(
        (r for r, n in family.params.items() if n >= student * (1 - TOLERANCE)), key=family.params.__getitem__
    )
    config = family.rungs[able[0]]
    try:
        shape = shared = common_shape(family.common_rungs, student, multiple=family.multiple)
        # Not every rung that is large enough holds it: it may have fewer layers.
        config = next((family.rungs[r] for r in able if not unfit(shared, dims(family.rungs[r]))), config)
    except ConfigError:
        shape, shared = choose_shape(config, student, multiple=family.multiple), None
    return config_with(config, sized(dims(config), shape)), shared


def _by_law(ask: Ask, law: Mapping[str, Any]) -> Recommendation:
    optima = [o for o in law["optima"] if o["status"] == "interior"]
    ask, draws = _marked(ask, law["optima"]), law_draws(law)
    best = draws[:, 0] + draws[:, 1] * np.log(ask.student_count)
    left, right = bends(optima)
    away = ask.x[None, :] - best[:, None]
    known = bool(np.isfinite(left))
    excess = away**2 * (np.where(away < 0, left, right) if known else 1.0)
    rungs, first = scored(ask.rungs, excess, known=known)
    low, middle, high = np.exp(np.quantile(best, (0.025, 0.5, 0.975)))
    findings = [
        f"The law puts the best teacher at {middle / ask.student_count:.2f} times the student: {short(middle)} "
        f"parameters ({ask.axis}; 95 % {short(low)} to {short(high)}).",
        _made_on(law["optima"]),
    ]
    return answer(ask, "law", first, rungs, findings, [*_extrapolation(ask, optima), *_beyond(ask, best)])


def law_draws(law: Mapping[str, Any], *, seed: int = 0) -> Array:
    """Pairs (log r, b) of log N_T* = log r + b·log N_S [B, 2]: the law's own, or drawn from its intervals.

    From intervals: the ratio is log-normal at the students' geometric mean, and the exponent b normal about its
    estimate (1 where none is given), turning around that mean, so that doubt grows with distance from the fit.
    """
    if law.get("draws"):
        return np.array(law["draws"], float).reshape(-1, 2)
    generator = np.random.default_rng(seed)
    low, high = np.log(law["ratio_interval"])
    log_ratio = np.log(law["ratio"]) + (high - low) / (2 * Z) * generator.standard_normal(DRAWS)
    b = np.ones(DRAWS)
    if law.get("slope") is not None and law.get("slope_interval"):
        least, most = law["slope_interval"]
        b = law["slope"] + (most - least) / (2 * Z) * generator.standard_normal(DRAWS)
    centre = np.mean([np.log(o["student_params"]) for o in law["optima"] if o["status"] == "interior"])
    return np.stack([log_ratio + (1 - b) * centre, b], axis=1)


def bends(optima: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Curvatures c of loss = c·log²(N_T/N_T*) below and above the best teacher, medians over curves.

    From the flat intervals, at whose ends the loss is 0.005 nats above its minimum. NaN where none is known.
    """
    sides: list[list[float]] = [[], []]
    for o in optima:
        for side, end in zip(sides, o["flat_interval"], strict=True):
            if end is not None and abs(np.log(end / o["teacher_params"])) > 1e-3:
                side.append(FLAT_NATS / np.log(end / o["teacher_params"]) ** 2)
    left, right = (float(np.median(s)) if s else np.nan for s in sides)
    return (right if np.isnan(left) else left), (left if np.isnan(right) else right)


def _by_surface(ask: Ask, surface: SurfaceFit, told: list[str]) -> Recommendation:
    low, high = surface.span["ratio"]
    tested = [r for r in ask.rungs if low <= r.ratio <= high]
    never = [replace(r, note="; ".join(filter(None, (r.note, "ratio never tested")))) for r in ask.rungs]
    untested = tuple(n for r, n in zip(ask.rungs, never, strict=True) if r not in tested)
    choice = best_teacher(surface, student_params=ask.student_count, data_tokens=float(ask.tokens))
    findings = [*told, *_surface_findings(surface, choice.status, choice.ratio, choice.interval)]
    away = surface.outside(student_params=ask.student_count, data_tokens=float(ask.tokens), teacher_params=1.0)
    warnings = [f"{EXTRAPOLATES} in {_known(surface, k)}" for k in away if k not in ("teacher_params", "ratio")]
    warnings += other_family(ask, surface.families)
    if not tested:
        return answer(ask, "nothing", None, untested, findings, [*warnings, NO_RATIO])
    if choice.status == "flat":
        return answer(ask, "surface", tested[0].name, (*tested, *untested), findings, warnings)
    teachers = np.array([r.ratio * ask.student_count for r in tested])
    at = {"student_params": ask.student_count, "data_tokens": float(ask.tokens), "teacher_params": teachers}
    losses = surface.predict_draws(**at) if surface.draws else surface.predict(**at)[None]
    rungs, first = scored(tested, losses, known=True)
    ordered = tuple(sorted((*rungs, *untested), key=lambda r: r.ratio))
    return answer(ask, "surface", first, ordered, findings, warnings)


def _surface_findings(
    surface: SurfaceFit, status: str, ratio: float | None, interval: Sequence[float | None]
) -> list[str]:
    low, high = surface.span["ratio"]
    said = {
        "flat": "On the surface no teacher can be told from another: take the cheapest.",
        "left_edge": f"On the surface the loss only rises from the smallest tested ratio, {low:.2f}, on.",
        "right_edge": f"On the surface the loss still falls at the largest tested ratio, {high:.2f}: a larger teacher "
        "may be better yet, but none was tried.",
    }
    if ratio is not None:
        said["interior"] = (
            f"The surface puts the best teacher at {ratio:.2f} times the student (95 % {span(interval, short)} "
            "parameters)."
        )
    spans = [f"{k} {between(*ends)}" for k, ends in surface.span.items()]
    return [said[status], f"The surface was fitted to {surface.runs} runs: {', '.join(spans)}."]


def _known(surface: SurfaceFit, name: str) -> str:
    return f"{name}, fitted on {between(*surface.span[name])}: what is said supposes that the form holds there"


def _by_bounds(ask: Ask, optima: Sequence[Mapping[str, Any]], told: list[str]) -> Recommendation:
    """The smallest of the rungs that most curves allow; curves that are flat or not unimodal rule nothing out."""
    bounding = [o for o in optima if o["status"] in ("interior", "left_edge", "right_edge")]
    if not bounding:
        findings = [*told, *([_made_on(optima)] if optima else []), "No curve bounds the best teacher on any side."]
        return answer(ask, "nothing", None, ask.rungs, findings, _extrapolation(ask, optima) if optima else [])
    ask = _marked(ask, bounding)
    rungs = [replace(r, allowed=sum(_allows(o, r.ratio) for o in bounding)) for r in ask.rungs]
    most = max(r.allowed or 0 for r in rungs)
    best = next(r for r in rungs if r.allowed == most)
    findings = [
        *told,
        f"`allowed` counts {len(bounding)} curves that bound their best teacher, supposing that ratios of teacher to "
        f"student carry over; {len(optima) - len(bounding)} more rule nothing out.",
        _made_on(optima),
        f"{best.name} is the smallest rung that the most curves ({most} of {len(bounding)}) allow. That is no law.",
    ]
    name = best.name if most else None
    return answer(ask, "bounds" if most else "nothing", name, rungs, findings, _extrapolation(ask, bounding))


def _marked(ask: Ask, optima: Sequence[Mapping[str, Any]]) -> Ask:
    """The question with the rungs marked whose ratio to the student lies beyond those that were tried."""
    ratios = [t[0] / o["student_params"] for o in optima for t in o.get("tried") or ()]
    if not ratios:
        return ask
    student = np.log(ask.student_count)
    return with_range(ask, student + np.log(min(ratios)), student + np.log(max(ratios)))


def _allows(optimum: Mapping[str, Any], ratio: float) -> bool:
    low, high = (None if v is None else v / optimum["student_params"] for v in optimum["interval"])
    return (low is None or ratio >= low) and (high is None or ratio <= high)


def _against(joint: Mapping[str, Any], law: Mapping[str, Any] | None) -> list[str]:
    """What the fit curve by curve says, where it is something else, and why."""
    if law is None or joint["status"] == "break_even":
        return []
    if law["status"] != "law":
        return [
            f"Curve by curve there is no law (status {law['status']}). The model of all cells has more power: its "
            "curves share curvature, and each teacher's own error is seen in all of them."
        ]
    (low, high), (least, most) = law["ratio_interval"], joint["ratio"]["interval"]
    if low <= (np.inf if most is None else most) and (least or 0.0) <= high:
        return []
    return [
        f"Curve by curve the ratio is {law['ratio']:.2g} ({low:.2g} to {high:.2g}), which disagrees: that interval "
        "takes the shape of each curve for known. The model of all cells averages over shapes."
    ]


def _no_law(law: Mapping[str, Any]) -> str:
    reasons = {
        "no_optimum": "its curves have no optimum that stands out from noise",
        "censored": "the optima lie at or beyond the ends of its grid",
        "too_few": "it has too few students or teachers",
    }
    reason = reasons.get(law["status"], "no ratio was claimed")
    return f"There is NO LAW in this fit (status {law['status']}: {reason}), so no probabilities follow from one."


def _made_on(optima: Sequence[Mapping[str, Any]]) -> str:
    """At what scale the fit was made."""
    students = [o["student_params"] for o in optima]
    said = [f"students of {between(min(students), max(students))} parameters"] if students else ["nothing"]
    tokens = [o["data_tokens"] for o in optima if o.get("data_tokens")]
    return made_on(said, tokens, sorted({o["family"] for o in optima if o.get("family")}))


def _extrapolation(ask: Ask, optima: Sequence[Mapping[str, Any]]) -> list[str]:
    """In which respects the question lies outside the fit."""
    found = []
    students = [o["student_params"] for o in optima]
    low, high = min(students), max(students)
    if not low * (1 - TOLERANCE) <= ask.student_count <= high * (1 + TOLERANCE):
        over = ask.student_count > high
        times = f"{short(ask.student_count / high)} times the largest" if over else "below the smallest"
        found.append(f"{EXTRAPOLATES}: the student is {times} in the fit; what is said supposes that it holds there")
    per = [o["data_tokens"] / o["student_params"] for o in optima if o.get("data_tokens")]
    asked = ask.tokens / ask.student_count
    if per and not min(per) * 0.97 <= asked <= max(per) * 1.03:
        found.append(
            f"{EXTRAPOLATES}: {asked:.3g} tokens per parameter lie outside the fit ({min(per):.3g} to {max(per):.3g}); "
            "the best teacher is known to move with the budget"
        )
    return [*found, *other_family(ask, sorted({o["family"] for o in optima if o.get("family")}))]


def _beyond(ask: Ask, best: Array) -> list[str]:
    """Whether the ladder ends before the law's best teacher."""
    above, below = float((best > ask.x[-1]).mean()), float((best < ask.x[0]).mean())
    found = [f"the best teacher lies above the ladder's last rung with probability {above:.0%}"] if above > 0.5 else []
    return [
        *found,
        *([f"it lies below the ladder's first rung that fits with probability {below:.0%}"] if below > 0.5 else []),
    ]
