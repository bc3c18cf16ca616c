"""`python -m loadmaster`."""

import sys

from loadmaster.cli import main

sys.exit(main())
