"""`python -m bench.static`: compile the kernels for GPUs that are not here, and read the binaries."""

import sys

from bench.static.compile import main

sys.exit(main())
