"""``python -m liar_ext`` is ``liar``."""

import sys

from liar_ext.cli.main import main

sys.exit(main())
