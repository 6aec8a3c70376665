"""Runs one cell, or with -m a grid of them: teacher → scores → student → distillation → record.

python run.py student=60k teacher=120k data=1m
python run.py -m student=60k,90k teacher=120k,180k,270k data=1m,4m seed=0,1,2
python run.py -m +sweeps=quick
"""

import sys

try:
    import hydra
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: {error.name} is not installed for {sys.executable}. `make demo` installs everything into .venv: "
        "`source .venv/bin/activate`, or `.venv/bin/python run.py …`."
    ) from None

from capacity_gap.cell import config
from capacity_gap.commands.explain import ends_single_run, explained
from capacity_gap.runner import single
from capacity_gap.runner.run_cell import run_config

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: object) -> str:
    """One job of Hydra's: everything it does is in `capacity_gap.cell.pipeline`."""
    with ends_single_run() as overrides:
        settings = config.from_hydra(composed)
        return run_config(settings) if overrides is None else single.run_alone(settings, overrides)


if __name__ == "__main__":
    sys.exit(explained(main))
