"""Configure how the OpenMP threads of this process wait."""

import os

_SPINS = "GOMP_SPINCOUNT"
_SPIN_COUNT = 4000
"""Turns that a waiting thread spins before it sleeps: 0.1 to 0.2 ms. GNU's default is 300,000.

Measured by benchmarks/company.py: fewer turns are slower on an idle machine, as threads then sleep between
the operations of a step, and more turns are slower beside other programs.
"""


def limit_spinning() -> None:
    """Make OpenMP threads sleep soon after they run out of work; must be called before torch is imported.

    A thread that spins holds its core while the thread that it waits for is queued behind another program.
    GNU OpenMP, which torch's packages for Linux use, reads the limit once, when it is loaded. The function
    changes nothing if the environment configures the waiting (`OMP_WAIT_POLICY`, `GOMP_SPINCOUNT`).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(_SPINS, str(_SPIN_COUNT))
