"""How fast a worker is: as given, as measured in the store, else as its devices promise. Imports no torch.

A stage takes `flops · a + passes · b` seconds: arithmetic, and what moving every token through the layers costs
however small the model. Both are fitted to what finished stages of this store took, so one calibration cell is enough.
Ranks share the work of a training stage; all others run on the first.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from capacity_gap.models.accounting import known_device, peak_flops
from capacity_gap.runner.machines import Worker
from capacity_gap.settings.scales import short_scale
from capacity_gap.store.files import NUMBER, read_all, stage_files
from capacity_gap.store.stage import Stage, Store

# FLOP/s of one thread in fp32 by a model's parameters, measured on two-core x86 machines with AVX2: on matrices of pico
# size, and of the 110M student under SmolLM2-135M (results/real_step.csv: 92 tokens a second of (6·110M + 2·135M)).
CPU_FLOPS = ((1e6, 1.3e10), (1.1e8, 8.6e10))
CPU_SECONDS_PER_PASS = 2e-5  # measured on matrices of pico size
MFU = 0.4  # share of a GPU's peak that is assumed; runs of published size report 0.3 to 0.5
TIMED = {"name": str, "cost_flops": NUMBER, "wall_s": NUMBER, "created": str, "device": str}  # of a finished stage


@dataclass(frozen=True)
class Speed:
    """How fast one worker is, and how that is known."""

    seconds_per_flop: float  # of one rank
    seconds_per_pass: float
    source: str
    fixed: dict[str, float]  # mean seconds of stages without FLOPs (corpus, tokens, …), by name
    ranks: int = 1
    by_size: bool = False  # whether larger models run at more FLOP/s than `seconds_per_flop` says

    @property
    def assumed(self) -> bool:
        """Whether nothing was measured or given."""
        return self.source.startswith("assumed")

    def seconds(self, stage: Stage) -> float:
        """What one worker needs for this stage alone."""
        if not stage.cost:
            return self.fixed.get(stage.name, 0.0)
        # A pass of a token takes two FLOPs a parameter: the mean size of the models that run in this stage.
        own = self.by_size and stage.passes > 0
        each = 1 / cpu_flops(stage.cost / stage.passes / 2) if own else self.seconds_per_flop
        alone = stage.cost * each + stage.passes * self.seconds_per_pass
        return alone / self.ranks if stage.collective else alone


def speed(
    store: Store, worker: Worker, *, throughput: float | None = None, collective: Collection[str] = ()
) -> tuple[Speed, Worker]:
    """The speed of one worker as given (FLOP/s), else as measured in this store, else as assumed.

    Args:
        store: whose finished stages calibrate it.
        worker: its devices.
        throughput: of all its devices.
        collective: names of the stages that ranks share.

    Returns:
        The speed, and the worker with the device that was measured where none is named.
    """
    made = [meta for _, meta in read_all(store.root, stage_files(store.root), TIMED, check=_check_numbers)]
    fixed, ranks = _fixed(made), worker.ranks
    if throughput:
        return Speed(ranks / throughput, 0.0, f"given: {throughput:.3g} FLOP/s a worker", fixed, ranks), worker
    # The wall time of a resumed stage is that of its last part only.
    timed = [m for m in made if m["cost_flops"] > 0 and m.get("passes", 0) > 0 and not m.get("resumed", False)]
    if timed := [m for m in timed if _is_like(m, worker)]:
        # A store may have moved between machines: the device of the latest stage counts.
        device = max(timed, key=lambda m: m["created"])["device"]
        timed = [m for m in timed if m["device"] == device]
        a, b = _fit(timed, collective)
        said = f"measured: {len(timed)} finished stages of this store on {device}{_share_of_peak(a, device, worker)}"
        return Speed(a, b, said, fixed, ranks), replace(worker, gpu=device) if worker.gpu else worker
    if worker.gpu:
        return Speed(1 / (worker.peak * MFU * worker.share), 0.0, _assumed(worker), fixed, ranks), worker
    (small, slow), (large, fast) = CPU_FLOPS
    said = (
        f"assumed: {slow:.3g} FLOP/s a CPU thread for models up to {short_scale(small)} parameters, {fast:.3g} from "
        f"{short_scale(large)} on; one finished cell calibrates it"
    )
    return Speed(1 / slow, CPU_SECONDS_PER_PASS, said, fixed, ranks, by_size=True), worker


def cpu_flops(params: float) -> float:
    """FLOP/s that one thread is assumed to sustain: a power of the size between the two measured ones."""
    (small, slow), (large, fast) = CPU_FLOPS
    part = math.log(min(max(params, small), large) / small) / math.log(large / small)
    return slow * (fast / slow) ** part


def _is_like(meta: Mapping[str, Any], worker: Worker) -> bool:
    """Whether a finished stage is informative about the worker: CPU timings do not apply to a GPU, nor fp32 to bf16."""
    if not worker.gpu:
        return True
    device, config = meta["device"], meta.get("config")
    precision = config.get("precision") if isinstance(config, Mapping) else None
    same = device == worker.gpu or (known_device(device) or device) == known_device(worker.gpu)
    return not device.startswith("cpu") and (same or worker.assumed) and precision in (None, worker.precision)


def _share_of_peak(seconds_per_flop: float, device: str, worker: Worker) -> str:
    peak = peak_flops(device, worker.precision)
    return f", {1 / seconds_per_flop / peak:.0%} of its peak" if peak and seconds_per_flop else ""


def _assumed(worker: Worker) -> str:
    """The peak, the utilisation, and how the device is known."""
    hint = ""
    if worker.precision != "bf16":
        hint = f" (bf16 has {replace(worker, precision='bf16').peak / 1e12:.4g}: train.precision)"
    part = "" if worker.share == 1 else f", {worker.share:.3g} of a device a cell"
    return (
        f"assumed: {worker.peak * MFU * worker.devices:.3g} FLOP/s a worker, {worker.ranks} x {worker.gpu} "
        f"({worker.named}) at {MFU:.0%} MFU of {worker.peak / 1e12:.4g} TFLOP/s in {worker.precision}{hint}{part}; "
        "one finished cell calibrates it"
    )


def _check_numbers(file: Path, meta: Mapping[str, Any]) -> None:
    if not isinstance(meta.get("passes", 0), NUMBER):
        raise TypeError(f"passes: {meta['passes']!r}")
    if not isinstance(meta.get("ranks", 1), int) or meta.get("ranks", 1) < 1:
        raise TypeError(f"ranks: {meta['ranks']!r}")


def _fixed(made: Iterable[dict[str, Any]]) -> dict[str, float]:
    walls: dict[str, list[float]] = {}
    for meta in made:
        if not meta["cost_flops"]:
            walls.setdefault(meta["name"], []).append(meta["wall_s"])
    return {name: sum(w) / len(w) for name, w in walls.items()}


def _fit(timed: Sequence[dict[str, Any]], collective: Collection[str]) -> tuple[float, float]:
    """Non-negative least squares of wall = flops·a + passes·b, each stage weighted by the root of what it took.

    Between absolute errors (long stages decide what a grid costs) and relative ones (short stages are many). Of what
    several ranks shared each did its part.
    """
    import numpy as np
    from scipy.optimize import nnls

    wall = np.array([max(m["wall_s"], 1e-3) for m in timed])
    ranks = np.array([m.get("ranks", 1) if m["name"] in collective else 1 for m in timed], dtype=float)
    terms = np.array([[m["cost_flops"], m["passes"]] for m in timed], dtype=float) / ranks[:, None]
    # FLOPs are larger than passes by orders of magnitude: unscaled, the system would be ill-conditioned.
    scale = terms.max(axis=0)
    found, _ = nnls(terms / scale / np.sqrt(wall)[:, None], np.sqrt(wall))
    return tuple(found / scale)
