"""From which teacher should I distil a student of N parameters? Grids of prune-and-distil runs, and a fit of the law.

The chain of one run reads top to bottom in `capacity_gap.cell.pipeline`; the fit lives in `capacity_gap.fit` and needs
neither torch nor W&B. Importing this package imports nothing heavy.
"""

__version__ = "0.2.0"
