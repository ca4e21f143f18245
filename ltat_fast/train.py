"""Train the teacher if the method needs one, then the student, then evaluate with the paper's metrics.

    python -m ltat_fast.train                                                  # embedded digits, one minute on a CPU
    python -m ltat_fast.train --dataset tinyimagenet-lt --data-dir DIR         # the paper's Tiny-ImageNet-LT run
    python -m ltat_fast.train --out RUN --resume                               # resume after an interruption
    torchrun --nproc-per-node=8 -m ltat_fast.train ...                         # the same on eight GPUs

Exit status: 0 done; 2 wrong flag, path or data, full disk, or out of memory; 3 a loss or a weight was not finite, or a
one-step attack collapsed; 4 another process of the run died; 75 interrupted, state saved; 76 the CUDA graph could not
be captured (the command then continues by itself in a new process with --compile step). See docs/reliability.md.
"""

import ltat_fast.entry_point  # noqa: F401  (before torch)

# isort: split
import contextlib
import os
import shlex
import sys

from ltat_fast import trust
from ltat_fast.config import Config, differences, load
from ltat_fast.errors import (
    EXIT_DIVERGED,
    EXIT_GRAPH_FAILED,
    EXIT_INTERRUPTED,
    EXIT_LOST_PROCESS,
    EXIT_USER_ERROR,
    UserError,
    exit_on_user_error,
)
from ltat_fast.flags import parse_args


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv[1:]`` if None) and return the exit status."""
    config, method = parse_args(argv)

    from ltat_fast.files import lock_run_dir
    from ltat_fast.out_of_memory import OutOfMemory, explained
    from ltat_fast.runs import log
    from ltat_fast.signals import Interrupted, stop_at_once
    from ltat_fast.training import device, distributed, pipeline
    from ltat_fast.training.backend import GraphNotUsable
    from ltat_fast.training.collapse import Collapsed
    from ltat_fast.training.recovery import Diverged

    hardware = device.choose(config.device, config.precision)
    is_main = distributed.world_from_environment().is_main
    if is_main:
        prepare_run_dir(config, method)
    else:
        log.quiet()
    try:
        lock = lock_run_dir(config.run_dir) if is_main else contextlib.nullcontext()
        advice = "keep the images off the device (--data-placement stream), or use a smaller --batch-size"
        with lock, stop_at_once(), explained(advice):
            (config.run_dir / "interrupted").unlink(missing_ok=True)
            distributed.start(hardware.device.type == "cuda")
            pipeline.train(config, method, hardware)
            distributed.wait()  # a process that exits early aborts the collectives of the others
    except OutOfMemory as error:
        sentence = f"{error}{what_is_kept(config, error.flags)}"
        if distributed.current().size == 1:
            raise UserError(sentence) from error
        print(f"ltat_fast: error: {sentence}", file=sys.stderr)
        distributed.exit_at_once(EXIT_USER_ERROR)
    except (Diverged, Collapsed) as error:
        print(f"ltat_fast: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    except GraphNotUsable as error:
        log.say(f"WARNING: backend graph is not used: {error}; a new process continues with --compile step")
        return EXIT_GRAPH_FAILED
    except RuntimeError as error:
        if not distributed.is_lost_process_error(error):
            raise
        reason = str(error).splitlines()[0].split(". ")[0]
        print(f"ltat_fast: another process of this run died, see its own message ({reason})", file=sys.stderr)
        distributed.exit_at_once(EXIT_LOST_PROCESS)
    except Interrupted as error:
        if is_main and (config.run_dir / "config.json").exists():
            with contextlib.suppress(OSError):
                (config.run_dir / "interrupted").write_text(f"{error}\n")
        log.say(f"{error}; resume with: {resume_command(config)}")
        return EXIT_INTERRUPTED
    finally:
        distributed.stop()
    return 0


def prepare_run_dir(config: Config, method) -> None:
    """Create the run folder, or check that ``--resume`` fits it.

    Raises UserError if the run would overwrite another one, has other settings, or cannot write into the folder.
    """
    from ltat_fast import files

    run_dir = config.run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--out {run_dir} is a file, not a folder")
    # Hidden files do not count: the lock, and temporary files of a start that was killed.
    used = run_dir.is_dir() and any(not path.name.startswith(".") for path in run_dir.iterdir())
    if config.resume:
        if not (run_dir / "config.json").exists():
            raise UserError(f"nothing to resume: {run_dir} contains no run")
        changed = differences(*load(run_dir), config, method)
        if changed:
            raise UserError(f"{run_dir} was started with other settings: {', '.join(changed)}")
    elif used:
        raise UserError(f"{run_dir} is not empty: add --resume to continue its run, or choose another --out")
    else:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the run folder {run_dir}: {error.strerror}") from None
    files.refuse_read_only(run_dir)


def resume_command(config: Config, flags: str = "") -> str:
    if any((name or "").startswith(trust.MODULE) for name in (config.arch, config.teacher)):
        flags += " --trust-run"  # this command named the code, the next one does not
    return f"python -m ltat_fast.train --out {shlex.quote(str(config.run_dir))} --resume {flags.strip()}".rstrip()


def what_is_kept(config: Config, flags: str) -> str:
    """Return the end of a sentence: how the run can go on after it ran out of memory.

    flags: with which it can be resumed. The sizes of batches are part of the experiment, so without such flags only a
    machine with more memory can resume it.
    """
    from ltat_fast.runs import checkpoint
    from ltat_fast.training.stage import state_file

    saved = any(checkpoint.has_state(state_file(config, stage)) for stage in ("teacher", "student"))
    if saved and flags:
        return f"; resume with: {resume_command(config, flags)}"
    if saved:
        return (
            "; these need a new run in another --out; the saved state is kept, and with more free memory it resumes "
            f"with: {resume_command(config)}"
        )
    if (config.run_dir / "config.json").exists():
        return f"; nothing is trained yet: delete {config.run_dir}, or choose another --out"
    return ""


def continue_without_graph() -> None:
    """Replace this process by one that continues the run with ``--compile step``.

    A failed capture leaves torch in a state in which it can no longer use the GPU reliably.
    """
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "--compile", "step", "--resume"])


if __name__ == "__main__":
    from ltat_fast.signals import leave

    if (status := main()) == EXIT_GRAPH_FAILED:
        continue_without_graph()
    leave(status)
