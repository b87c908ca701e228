"""``python -m bestiary.kernels.shim``: see the package's docstring."""

import sys

from bestiary.kernels.shim.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
