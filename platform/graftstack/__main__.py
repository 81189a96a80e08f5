"""``python -m graftstack``: the command line."""

import sys

from graftstack.cli import main

sys.exit(main())
