"""`python -m tolserve` is the command `tolserve`."""

import sys

from tolserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
