"""`python -m capacity_gap`."""

import sys

from capacity_gap.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
