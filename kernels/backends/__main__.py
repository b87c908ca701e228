"""``python -m bestiary.kernels.backends`` builds the C++ kernels ahead. native.py itself would load twice."""

import sys

from bestiary.kernels.backends.native import main

if __name__ == "__main__":
    sys.exit(main())
