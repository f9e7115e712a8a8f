"""`python -m harness COMMAND ...` is `ssodbench COMMAND ...`, so that torchrun can start it."""

import sys

from harness.cli import main

sys.exit(main())
