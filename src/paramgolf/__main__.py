"""`python -m paramgolf` is `golf`: the form that `torchrun -m paramgolf run ...` needs."""

import sys

from paramgolf.cli import main

if __name__ == "__main__":
    sys.exit(main())
