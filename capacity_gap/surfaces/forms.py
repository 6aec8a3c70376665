"""The functional forms of loss surfaces: losses with their gradients in closed form, bounds, and where to start.

All columns are natural logarithms about their means, `n = log N_S − log N₀` and so on, so that amplitudes are losses at
the middle of the data and hardly correlate with exponents. `natural` undoes it: the parameters as usually reported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from capacity_gap.estimators.batched import Array, Columns

VANISHED = -700.0  # log of an amplitude that is held at nothing: exp(−700) ≈ 1e-304


@dataclass(frozen=True)
class Form:
    """One form. `parameters` are internal ones; `lower`, `upper` and the box of starts `low`, `high` belong to them.

    NaN marks a bound that depends on the data: the least loss for E, the range of ratios for mu. `inputs` name the
    columns it needs; `alone` those not identified where a column takes one value, and where they are held.
    """

    name: str
    equation: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    loss: Callable[[Array, Columns, bool], tuple[Array, Array | None]]
    natural: Callable[[Array, Mapping[str, float]], dict[str, Array]]
    alone: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def index(self, name: str) -> int:
        """Position of an internal parameter."""
        return self.parameters.index(name)


def _parts(theta: Array) -> Sequence[Array]:
    """Each parameter as [B, 1], ready to meet columns [n] or [B, n]."""
    return [theta[:, i : i + 1] for i in range(theta.shape[1])]


def _filled(parts: Sequence[Array], like: Array) -> Array:
    """Gradients [B, p, n]."""
    out = np.empty((like.shape[0], len(parts), like.shape[1]))
    for i, part in enumerate(parts):
        out[:, i] = part
    return out


def chinchilla_loss(theta: Array, x: Columns, slopes: bool) -> tuple[Array, Array | None]:
    """L(N, D) = E + A/N^α + B/D^β  (Hoffmann et al. 2022, arXiv 2203.15556)."""
    E, a, alpha, b, beta = _parts(theta)
    n, d = x["student_params"], x["data_tokens"]
    of_n, of_d = np.exp(a - alpha * n), np.exp(b - beta * d)
    loss = E + of_n + of_d
    return loss, _filled([np.ones(1), of_n, -n * of_n, of_d, -d * of_d], loss) if slopes else None


def chinchilla_natural(theta: Array, at: Mapping[str, float]) -> dict[str, Array]:
    """A = e^a·N₀^α, B = e^b·D₀^β."""
    E, a, alpha, b, beta = theta.T
    A, B = (
        np.where(log <= VANISHED, 0.0, np.exp(log + power * at[column]))
        for log, power, column in ((a, alpha, "student_params"), (b, beta, "data_tokens"))
    )
    return {"E": E, "A": A, "alpha": alpha, "B": B, "beta": beta}


def supervised_loss(theta: Array, x: Columns, slopes: bool) -> tuple[Array, Array | None]:
    """L̃(N, D) = E + (A/N^α + B/D^β)^γ  (Busbridge et al. 2025, arXiv 2502.08606, for models trained on text)."""
    E, a, alpha, b, beta, g = _parts(theta)
    n, d, gamma = x["student_params"], x["data_tokens"], np.exp(g)
    of_n, of_d = np.exp(a - alpha * n), np.exp(b - beta * d)
    log_sum = np.log(of_n + of_d)
    power = np.exp(gamma * log_sum)
    if not slopes:
        return E + power, None
    per_n, per_d = gamma * power * (of_n / (of_n + of_d)), gamma * power * (of_d / (of_n + of_d))
    grads = [np.ones(1), per_n, -n * per_n, per_d, -d * per_d, power * gamma * log_sum]
    return E + power, _filled(grads, power)


def supervised_natural(theta: Array, at: Mapping[str, float]) -> dict[str, Array]:
    """As Chinchilla, with γ."""
    return {**chinchilla_natural(theta[:, :5], at), "gamma": np.exp(theta[:, 5])}


def distillation_loss(theta: Array, x: Columns, slopes: bool) -> tuple[Array, Array | None]:
    """L_S = L_T + L_T^(−c0)·[1 + (L_T/(d1·L̃))^(1/f1)]^(−c1·f1)·(A'/N_S^α' + B'/D_S^β')^γ'  (docs/method.md §5).

    `own_loss` is log L̃(N_S, D_S), what the student would reach on text alone; `log_teacher_loss` is log L_T itself, and
    `teacher_loss` the same about its mean.
    """
    a, alpha, b, beta, g, c0, log_k, log_f1, log_d1 = _parts(theta)
    n, d, t, own = (x[k] for k in ("student_params", "data_tokens", "teacher_loss", "own_loss"))
    gamma, f1 = np.exp(g), np.exp(log_f1)
    of_n, of_d = np.exp(a - alpha * n), np.exp(b - beta * d)
    log_sum = np.log(of_n + of_d)
    # The floor keeps exp(−z) finite: exp(710) overflows.
    z = np.maximum((x["log_teacher_loss"] - own - log_d1) / f1, VANISHED)
    strength = np.exp(log_k + log_d1 / f1)  # c1·f1
    weight = strength * np.logaddexp(0.0, z)
    gap = np.exp(gamma * log_sum - c0 * t - weight)
    loss = np.exp(x["log_teacher_loss"]) + gap
    if not slopes:
        return loss, None
    per_n, per_d = gamma * gap * (of_n / (of_n + of_d)), gamma * gap * (of_d / (of_n + of_d))
    pull = strength / (1 + np.exp(-z))
    grads = [per_n, -n * per_n, per_d, -d * per_d, gap * gamma * log_sum, -t * gap, -weight * gap]
    grads += [gap * (weight * log_d1 / f1 + z * pull), gap * (pull - weight) / f1]
    return loss, _filled(grads, loss)


def distillation_natural(theta: Array, at: Mapping[str, float]) -> dict[str, Array]:
    """The mean of log L_T is moved out of L_T^(−c0) into A' and B'; log_k = log c1 + log f1 − log d1/f1.

    Where L_T is well below d1·L̃ only k can be seen, not c1 and d1 apart; so d1 has a direction of its own to be
    unknown in, instead of a curved valley.
    """
    a, alpha, b, beta, g, c0, log_k, log_f1, log_d1 = theta.T
    shift = np.exp(c0 * at["teacher_loss"] / np.exp(g))
    powers = chinchilla_natural(np.stack([c0, a, alpha, b, beta], axis=1), at)
    return {
        "A": powers["A"] * shift,
        "alpha": alpha,
        "B": powers["B"] * shift,
        "beta": beta,
        "gamma": np.exp(g),
        "c0": c0,
        "c1": np.exp(log_k - log_f1 + log_d1 / np.exp(log_f1)),
        "f1": np.exp(log_f1),
        "d1": np.exp(log_d1),
    }


SERIES = 0.1  # below it the differences in `linex` lose digits and a series takes over
_H = [1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040]


def linex(t: Array) -> tuple[Array, Array]:
    """h(t) = (eᵗ − t − 1)/t² and h'(t) = ((t − 2)·eᵗ + t + 2)/t³."""
    small = np.abs(t) < SERIES
    s = np.where(small, 1.0, t)
    grown = np.exp(s)
    value, slope = (grown - s - 1) / s**2, ((s - 2) * grown + s + 2) / s**3
    if small.any():
        near = t[small]
        value[small] = np.polyval(_H[::-1], near)
        slope[small] = np.polyval([j * c for j, c in enumerate(_H)][:0:-1], near)
    return value, slope


def additive_loss(theta: Array, x: Columns, slopes: bool) -> tuple[Array, Array | None]:
    """L = E + A/N_S^α + B/D^β + c·u²·h(k·u),  u = log(N_T/N_S) − μ − ν·log(D/N_S),  h(t) = (eᵗ − t − 1)/t².

    The last term is the capacity gap. It is zero at u = 0 and, for c > 0, positive elsewhere; for k = 0 it is the
    parabola c·u²/2, for k > 0 steeper above the best teacher, for k < 0 steeper below. Far to the left of its centre it
    is a plain power law in N_T, so that a loss which only falls is fitted by a centre at its bound, not inside.
    """
    *powers, c, k, mu, nu = _parts(theta)
    ratio, per = (x[name] for name in ("ratio", "tokens_per_param"))
    return _gapped(powers, x, ratio - mu - nu * per, c, k, [per] if slopes else None)


def additive_free_loss(theta: Array, x: Columns, slopes: bool) -> tuple[Array, Array | None]:
    """The same with u = log N_T − a − b·log N_S − d·log D: the additive surface is the case b + d = 1."""
    *powers, c, k, mu, b, d = _parts(theta)
    n, tokens, ratio = (x[name] for name in ("student_params", "data_tokens", "ratio"))
    return _gapped(powers, x, ratio - mu - (b - 1) * n - d * tokens, c, k, [n, tokens] if slopes else None)


def _gapped(
    powers: Sequence[Array], x: Columns, u: Array, c: Array, k: Array, moved: Sequence[Array] | None
) -> tuple[Array, Array | None]:
    """E + A/N_S^α + B/D^β + c·u²·h(k·u), and its slopes; `moved`: what each parameter behind μ multiplies in u."""
    E, a, alpha, b, beta = powers
    n, d = x["student_params"], x["data_tokens"]
    of_n, of_d = np.exp(a - alpha * n), np.exp(b - beta * d)
    h, h_slope = linex(k * u)
    shape = u * u * h
    loss = E + of_n + of_d + c * shape
    if moved is None:
        return loss, None
    fall = -c * u * (1 + k * u * h)  # −c·(e^{ku} − 1)/k
    grads = [np.ones(1), of_n, -n * of_n, of_d, -d * of_d, shape, c * u**3 * h_slope, fall]
    return loss, _filled([*grads, *(column * fall for column in moved)], loss)


def additive_natural(theta: Array, at: Mapping[str, float]) -> dict[str, Array]:
    """`ratio` is N_T*/N_S at the data's mean log tokens per parameter; `nu` how its log grows with log tokens per
    parameter.
    """
    found = chinchilla_natural(theta[:, :5], at)
    c, k, mu, nu = theta[:, 5:].T
    return {**found, "c": c, "k": k, "ratio": np.exp(mu + at["ratio"]), "nu": nu}


def additive_free_natural(theta: Array, at: Mapping[str, float]) -> dict[str, Array]:
    """`ratio` is N_T*/N_S at the data's mean (log) student and tokens; b and d are those of log N_T*."""
    found = chinchilla_natural(theta[:, :5], at)
    c, k, mu, b, d = theta[:, 5:].T
    return {**found, "c": c, "k": k, "ratio": np.exp(mu + at["ratio"]), "b": b, "d": d}


_POWERS = ("student_params", "data_tokens")
_ALONE = {"student_params": {"log_A": VANISHED, "alpha": 0.0}, "data_tokens": {"log_B": VANISHED, "beta": 0.0}}
# E, then two power laws: exponents up to 3; a term below e^-14 ≈ 1e-6 nats in the middle of the data is none.
_LOWER, _UPPER = (0.0, -14.0, 0.0, -14.0, 0.0), (np.inf, 7.0, 3.0, 7.0, 3.0)
_LOW, _HIGH = (0.0, -3.0, 0.05, -3.0, 0.05), (np.nan, 1.5, 1.0, 1.5, 1.0)
_NAMES = ("E", "log_A", "alpha", "log_B", "beta")

CHINCHILLA = Form(
    name="chinchilla",
    equation="L = E + A/N^alpha + B/D^beta",
    inputs=_POWERS,
    parameters=_NAMES,
    lower=_LOWER,
    upper=_UPPER,
    low=_LOW,
    high=_HIGH,
    loss=chinchilla_loss,
    natural=chinchilla_natural,
    alone=_ALONE,
)
SUPERVISED = Form(
    name="supervised",
    equation="L = E + (A/N^alpha + B/D^beta)^gamma",
    inputs=_POWERS,
    parameters=(*_NAMES, "log_gamma"),
    lower=(*_LOWER, -3.0),
    upper=(*_UPPER, 1.5),
    low=(*_LOW, -1.5),
    high=(*_HIGH, 0.5),
    loss=supervised_loss,
    natural=supervised_natural,
    alone=_ALONE,
)
DISTILLATION = Form(
    name="distillation",
    equation="L_S = L_T + L_T^-c0 * [1 + (L_T/(d1*L(N,D)))^(1/f1)]^(-c1*f1) * (A/N^alpha + B/D^beta)^gamma",
    inputs=(*_POWERS, "teacher_loss"),
    parameters=("log_A", "alpha", "log_B", "beta", "log_gamma", "c0", "log_k", "log_f1", "log_d1"),
    lower=(-40.0, 0.0, -40.0, 0.0, -3.0, 0.0, -14.0, -4.0, -1.5),
    upper=(20.0, 3.0, 20.0, 3.0, 1.5, 12.0, 10.0, 1.5, 3.0),
    low=(-3.0, 0.1, -3.0, 0.1, -1.0, 0.5, -3.0, -3.0, -0.3),
    high=(1.0, 0.8, 1.0, 0.8, 0.3, 5.0, 3.0, -0.5, 0.7),
    loss=distillation_loss,
    natural=distillation_natural,
    alone=_ALONE,
)
ADDITIVE = Form(
    name="additive",
    equation="L = E + A/N_S^alpha + B/D^beta + c*(exp(k*u) - k*u - 1)/k^2, u = log(N_T/N_S) - mu - nu*log(D/N_S)",
    inputs=(*_POWERS, "teacher_params"),
    parameters=(*_NAMES, "c", "k", "mu", "nu"),
    lower=(*_LOWER, 0.0, -3.0, np.nan, -3.0),
    upper=(*_UPPER, np.inf, 3.0, np.nan, 3.0),
    low=(*_LOW, 0.0, -1.0, np.nan, -0.3),
    high=(*_HIGH, 0.1, 1.0, np.nan, 0.3),
    loss=additive_loss,
    natural=additive_natural,
    alone={**_ALONE, "tokens_per_param": {"nu": 0.0}},
)
ADDITIVE_FREE = Form(
    name="additive_free",
    equation="L = E + A/N_S^alpha + B/D^beta + c*(exp(k*u) - k*u - 1)/k^2, u = log(N_T) - a - b*log(N_S) - d*log(D)",
    inputs=(*_POWERS, "teacher_params"),
    parameters=(*_NAMES, "c", "k", "mu", "b", "d"),
    lower=(*_LOWER, 0.0, -3.0, np.nan, -3.0, -4.0),
    upper=(*_UPPER, np.inf, 3.0, np.nan, 5.0, 4.0),
    low=(*_LOW, 0.0, -1.0, np.nan, 0.7, -0.3),
    high=(*_HIGH, 0.1, 1.0, np.nan, 1.3, 0.3),
    loss=additive_free_loss,
    natural=additive_free_natural,
    alone={
        "student_params": {**_ALONE["student_params"], "b": 1.0},
        "data_tokens": {**_ALONE["data_tokens"], "d": 0.0},
    },
)
FORMS = {f.name: f for f in (CHINCHILLA, SUPERVISED, DISTILLATION, ADDITIVE, ADDITIVE_FREE)}
