"""`minim3`, also as `python -m minim3`."""

import sys

from minim3.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
