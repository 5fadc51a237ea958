"""``python -m jbn``: the command line."""

import sys

from jbn.cli import main

if __name__ == "__main__":
    sys.exit(main())
