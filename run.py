"""Runs one cell, or with -m a grid of them: teacher → scores → student → distillation → record.

python run.py student=60k teacher=120k data=1m
python run.py -m student=60k,90k teacher=120k,180k,270k data=1m,4m seed=0,1,2
python run.py -m +sweeps=quick
"""

import sys

import hydra

from capacity_gap import alone, config, pipeline
from capacity_gap.explain import ends_single_run, explained

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: object) -> str:
    """One job of Hydra's: everything it does is in `capacity_gap.pipeline`."""
    with ends_single_run() as single:
        run = alone.run_alone if single else pipeline.run
        return run(config.from_hydra(composed))


if __name__ == "__main__":
    sys.exit(explained(main))
