"""`ssodbench` that asks this Slurm, which has nothing else to do, more often than a cluster likes to be asked.

`python -m tests.cluster.impatient COMMAND ...`; what it submits runs `ssodbench` itself.
"""

from __future__ import annotations

import sys

from harness import cli
from harness.launch import slurm
from harness.suite import cluster

if __name__ == "__main__":
    slurm.POLL_SECONDS = cluster.POLL_SECONDS = 1.0
    slurm.PASSING_SECONDS = 8.0
    sys.exit(cli.main())
