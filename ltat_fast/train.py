"""Train: the balanced self-teacher where the method wants one, then the student, then the paper's metrics.

    python -m ltat_fast.train                                                  # digits, embedded, CPU, a minute
    python -m ltat_fast.train --dataset tinyimagenet-lt --data-dir DIR         # the paper's Tiny-ImageNet-LT run
    python -m ltat_fast.train --out RUN --resume                               # go on after an interruption
    torchrun --nproc-per-node=8 -m ltat_fast.train ...                         # the same on many GPUs

Exit status: 0 done; 2 a flag, a path, the data or the disk is at fault; 3 a number was not finite; 4 another process of
the run died; 75 interrupted, state saved. docs/reliability.md tells more.
"""

import ltat_fast.entry_point  # noqa: F401  (before torch)

# isort: split
import contextlib
import shlex
import sys

from ltat_fast.config import Config, differences, load, parse_args
from ltat_fast.errors import UserError, exit_on_user_error

EXIT_DIVERGED, EXIT_LEFT_ALONE, EXIT_INTERRUPTED = 3, 4, 75


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    config, method = parse_args(argv)

    from ltat_fast.engine import device, distributed, log, pipeline, run
    from ltat_fast.engine.recovery import Diverged
    from ltat_fast.engine.signals import Interrupted, stop_at_once

    hardware = device.choose(config.device, config.precision)
    is_main = distributed.launched().is_main
    if is_main:
        prepare_run_dir(config, method)
    else:
        log.quiet()
    try:
        with run.claim(config.run_dir) if is_main else contextlib.nullcontext(), stop_at_once():
            (config.run_dir / "interrupted").unlink(missing_ok=True)
            distributed.start(hardware.device.type == "cuda")
            pipeline.train(config, method, hardware)
            distributed.wait()  # a process that leaves early aborts one still in a collective
    except Diverged as error:
        print(f"ltat_fast: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    except RuntimeError as error:
        if not distributed.is_loss_of_a_process(error):
            raise
        reason = str(error).splitlines()[0].split(". ")[0]
        print(f"ltat_fast: another process of this run is gone, see what it said ({reason})", file=sys.stderr)
        distributed.leave_broken(EXIT_LEFT_ALONE)
    except Interrupted as error:
        if is_main and (config.run_dir / "config.json").exists():
            with contextlib.suppress(OSError):
                (config.run_dir / "interrupted").write_text(f"{error}\n")
        log.say(f"{error}; go on with: python -m ltat_fast.train --out {shlex.quote(str(config.run_dir))} --resume")
        return EXIT_INTERRUPTED
    finally:
        distributed.stop()
    return 0


def prepare_run_dir(config: Config, method) -> None:
    """Make sure that this run may write into its folder. Raises UserError where it would overwrite another run."""
    from ltat_fast.engine import files

    run_dir = config.run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--out {run_dir} is a file, not a folder")
    # Hidden: the lock, and what a start that was killed at once had half written.
    used = run_dir.is_dir() and any(not path.name.startswith(".") for path in run_dir.iterdir())
    if config.resume:
        if not (run_dir / "config.json").exists():
            raise UserError(f"nothing to resume: {run_dir} holds no run")
        changed = differences(*load(run_dir), config, method)
        if changed:
            raise UserError(f"{run_dir} was started with other settings: {', '.join(changed)}")
    elif used:
        raise UserError(f"{run_dir} is not empty: add --resume to go on with it, or choose another --out")
    else:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the run folder {run_dir}: {error.strerror}") from None
    files.refuse_read_only(run_dir)


if __name__ == "__main__":
    from ltat_fast.engine.signals import leave

    leave(main())
