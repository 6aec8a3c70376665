"""What a table of records answers so far: which teacher, how sure that is, what to run next, and what it cost."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from capacity_gap.evaluate.task_scores import measured
from capacity_gap.report.content import Content, Panel, costs
from capacity_gap.report.next_pool import deciding
from capacity_gap.report.plots import LOSSES
from capacity_gap.settings.places import TOOL_WORDS
from capacity_gap.settings.scales import counted, short_scale
from capacity_gap.wording.curve_words import CurveWords, curve_words, ladder, listed
from capacity_gap.wording.fit_words import ESTABLISHED, JOINTS
from capacity_gap.wording.intervals import span

MOST = 4  # students that the first screen names
LEVEL = 0.05  # p above which permuted data do too well


@dataclass(frozen=True)
class Answer:
    """Sentences to four questions. `which` begins with the one that matters most."""

    which: tuple[str, ...]
    sure: tuple[str, ...]
    more: tuple[str, ...]
    cost: tuple[str, ...]

    @cached_property
    def questions(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Each question with its sentences."""
        return (
            ("Which teacher?", self.which),
            ("How sure?", self.sure),
            ("What next?", self.more),
            ("What did it cost?", self.cost),
        )

    def lines(self) -> list[str]:
        """As text for a terminal."""
        found = []
        for question, told in self.questions:
            found += [question, *(f"  {said}" for said in told)] if told else []
        return found


def answer_of(content: Content) -> Answer:
    """The four answers of a report's content."""
    cost = tuple(_cost(content))
    if content.law is None:
        return Answer((f"Not known yet: {content.problem}",), (), tuple(_failed(content)), cost)
    return Answer(tuple(_which(content)), tuple(_sure(content)), (*_next(content), *_failed(content)), cost)


def sentences(content: Content) -> list[tuple[Panel, CurveWords]]:
    """Each curve with its words, smallest student first, the largest budget first."""
    found = [(p, words_of(p, content)) for p in content.panels if p.optimum is not None]
    return sorted(found, key=lambda pair: (pair[0].curve.student_params, -_tokens(pair[0])))


def words_of(panel: Panel, content: Content) -> CurveWords:
    """One curve in words."""
    assert panel.optimum is not None
    rungs = ladder(panel.optimum.family) if content.axis == "total" else {}
    return curve_words(panel.optimum, rungs, measure=measured(content.metric))


def _tokens(panel: Panel) -> float:
    return float(panel.rows["data_tokens"].max()) if "data_tokens" in panel.rows else 0.0


def _largest(content: Content) -> list[Panel]:
    """The curve of each student at its largest budget; of several arms the one with most cells."""
    found: dict[str, Panel] = {}
    for panel in content.panels:
        before = found.get(panel.student)
        if before is None or (_tokens(panel), len(panel.rows)) > (_tokens(before), len(before.rows)):
            found[panel.student] = panel
    return sorted((p for p in found.values() if p.optimum), key=lambda p: p.curve.student_params)


def _which(content: Content) -> list[str]:
    """A claim about all students where there is one, then what is known of each at its largest budget."""
    law, joint = content.law, content.joint
    assert law is not None
    if joint is not None and joint.status != "no_optimum":
        first = joint.verdict()
        first = first[0].upper() + first[1:]
    elif law.ratio is not None and law.ratio_interval is not None:
        within = span(law.ratio_interval, "{:.2f}".format)
        first = f"The best teacher has {law.ratio:.2f} times its student's parameters (95 % {within})."
    else:
        first = "No ratio of teacher to student is shown that holds for all students."
    students = _largest(content)
    each = [_student(panel, content) for panel in students[:MOST]]
    left = len(students) - MOST
    return [first, *each, *([f"{left} more students are below."] if left > 0 else [])]


def _student(panel: Panel, content: Content) -> str:
    """What is known of one student's teacher: by the model of all cells where it says something, else by its curve."""
    words, joint, size = words_of(panel, content), content.joint, panel.curve.student_params
    tokens = _tokens(panel) or None
    if joint is not None and joint.status in ESTABLISHED:
        best = joint.best_teacher(size, tokens)
        likely = sorted(best.probabilities.items(), key=lambda pair: -pair[1])[:2]
        said = listed([f"{name} ({p:.0%})" for name, p in likely if p >= LEVEL])
        where = (
            f"about {short_scale(best.params)} parameters (95 % {span(best.interval)}); " if _is(best.params) else ""
        )
        return f"{words.curve}: {where}likeliest best: {said}."
    if joint is not None and joint.status == "break_even" and (even := joint.break_even(size)).established:
        small, large = (short_scale(n) for n in (even.small, even.large))
        return (
            f"{words.curve}: {large} is better than {small} above {short_scale(even.tokens)} tokens "
            f"(95 % {span(even.interval)})."
        )
    return f"{words.curve}: {'; '.join(filter(None, [words.claim, words.tried]))}."


def _sure(content: Content) -> list[str]:
    law, joint = content.law, content.joint
    assert law is not None
    said = [f"Curve by curve: {law.verdict()}"]
    if law.null_p is not None:
        bent = "no more than chance bends them" if law.null_p > LEVEL else "more than chance bends them"
        said.append(
            f"Teachers permuted at random give curves as convex in {law.null_p:.1%} of cases: these bend {bent}."
        )
    if joint is not None:
        rests = f" It rests on the rung {listed(joint.rests_on)}." if joint.rests_on else ""
        said.append(f"By one model of all {len(joint.joint.cells.y)} cells: {JOINTS.get(joint.status)}.{rests}")
    runs = min((t[2] for o in law.optima for t in o.tried), default=0)
    if runs == 1:
        said.append("Some teachers have one seed only, which cannot tell a teacher's size from its seed.")
    return said


def _next(content: Content) -> list[str]:
    """The cells that would narrow the ratio most, then what single curves of the largest budgets ask for."""
    asked: dict[tuple[str, str], list[str]] = {}
    for panel in _largest(content):
        words = words_of(panel, content)
        if words.more and not words.more.startswith("nothing"):
            place = words.curve.removeprefix(panel.student)  # what students share: their budget and settings
            asked.setdefault((words.more, place), []).append(panel.student)
    said = []
    if content.axis == "total" and content.metric in LOSSES and (cells := deciding(content.frame)):
        said.append(f"Cells that would narrow the ratio most for their cost: {'; '.join(cells)}.")
        command = shlex.join([*TOOL_WORDS, "next", content.source, "--goal", "law"])
        said.append(f"Their commands, where {content.source} is: {command}")
    curves = [f"{_some(students)}{place}: {more}" for (more, place), students in asked.items()][:MOST]
    if curves:
        said.append(f"For one curve alone: {'; '.join(curves)}.")
    return said or ["Nothing: every curve has its answer."]


def _some(students: Sequence[str]) -> str:
    left = len(students) - MOST
    return listed([*students[:MOST], *([f"{left} more"] if left > 0 else [])])


def _failed(content: Content) -> list[str]:
    count = len(content.failed)
    return [f"{counted(count, 'cell')} failed: see Failures."] if count else []


def _cost(content: Content) -> list[str]:
    """Cells, time and FLOPs; what nobody recorded is not 0."""
    taken, done = costs(content.done), len(content.done)
    said = [f"{counted(done, 'cell')} done"]
    if taken["seconds"] is not None:
        said.append(f"{_hours(taken['seconds'])} of distillation on one worker")
    parts = {"students": "training the students", "forward": "asking teachers", "teachers": "training teachers"}
    known = {name: value for name in parts if (value := taken[name]) is not None}
    if known:
        each = ", ".join(f"{parts[name]} {value:.2g}" for name, value in known.items())
        said.append(f"{sum(known.values()):.2g} FLOPs ({each})")
    else:
        said.append("FLOPs were not recorded")
    return [f"{'; '.join(said)}."]


def _hours(seconds: float) -> str:
    if seconds < 5400:
        return counted(max(1, round(seconds / 60)), "minute")
    return f"{seconds / 3600:,.1f} hours"


def _is(value: float) -> bool:
    return math.isfinite(value)
