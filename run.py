"""Runs one cell, or with -m a grid of them: teacher → scores → student → distillation → record.

python run.py student=60k teacher=120k data=1m
python run.py -m student=60k,90k teacher=120k,180k,270k data=1m,4m seed=0,1,2
python run.py -m +sweeps=quick

The installed package has the same as `capacity-gap run`.
"""

import sys

from capacity_gap.commands.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
