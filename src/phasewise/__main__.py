"""``python -m phasewise`` is the command ``phasewise``."""

import sys

from phasewise.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
