"""``python -m octav_hf.cli``."""

import sys

from .command import main

sys.exit(main())
