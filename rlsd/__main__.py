"""`python -m rlsd` is `rlsd`."""

import sys

from rlsd.cli import main

sys.exit(main())
