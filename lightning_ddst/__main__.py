"""``python -m lightning_ddst`` is the command ``lightning-ddst``."""

import sys

from lightning_ddst.cli import main

if __name__ == "__main__":
    sys.argv[0] = "lightning-ddst"
    main()
