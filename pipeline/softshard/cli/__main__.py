"""`python -m softshard.cli`."""

import sys

from softshard.cli.main import main

sys.exit(main())
