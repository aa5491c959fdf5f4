"""`python -m kvcomm`: the same as the command `kvcomm`."""

import sys

from kvcomm.cli import main

if __name__ == "__main__":
    sys.exit(main())
