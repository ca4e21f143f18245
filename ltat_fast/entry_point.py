"""Settings of a process that runs a command of this package. Every command imports this module before anything else.

The import has a side effect: it calls :func:`passive_openmp`, because torch reads the setting while it is loaded. A
program that only imports parts of this package, such as ``ltat_fast.ops``, keeps its own settings.
"""

import os


def passive_openmp() -> None:
    """Let idle OpenMP threads wait instead of spin, unless the environment already sets OMP_WAIT_POLICY.

    It has an effect only before torch is imported. On two cores, one of them busy with another process, an evaluation
    of the digits was 15 times slower with spinning threads. On idle cores waiting costs about 15 percent.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


passive_openmp()
