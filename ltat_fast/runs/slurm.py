"""Submit training runs as Slurm jobs."""

import shutil
import subprocess
from collections.abc import Sequence

from ltat_fast import files
from ltat_fast.errors import UserError
from ltat_fast.runs import log
from ltat_fast.runs.jobs import Job


def submit(jobs: Sequence[Job], partition: str, minutes: int) -> None:
    """Submit each job with one GPU and a time limit of ``minutes``. Raises UserError without submitit or Slurm."""
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm-partition needs submitit: pip install submitit") from None
    if shutil.which("sbatch") is None:  # submitit would run the jobs on this machine instead
        raise UserError("--slurm-partition needs Slurm, but sbatch is not on the PATH")
    for job in jobs:
        folder = job.log_file.parent / "slurm"
        files.make_folder(folder)
        executor = submitit.AutoExecutor(folder)
        limits = {"slurm_partition": partition, "timeout_min": minutes, "gpus_per_node": 1}
        executor.update_parameters(name=job.run_dir.name, **limits)
        log.say(f"{job.run_dir.name}: Slurm job {executor.submit(subprocess.check_call, job.command).job_id}")
