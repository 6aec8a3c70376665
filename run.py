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

from capacity_gap import alone, config, pipeline
from capacity_gap.explain import ends_single_run, explained

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: object) -> str:
    """One job of Hydra's: everything it does is in `capacity_gap.pipeline`."""
    with ends_single_run() as overrides:
        settings = config.from_hydra(composed)
        return pipeline.run(settings) if overrides is None else alone.run_alone(settings, overrides)


if __name__ == "__main__":
    sys.exit(explained(main))
