"""The error type whose message is for the user, and the exit statuses of the entry points."""

import functools
import sys
from collections.abc import Callable

EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_LOST_PROCESS = 2, 3, 4
EXIT_INTERRUPTED, EXIT_GRAPH_FAILED, EXIT_CTRL_C = 75, 76, 130


class UserError(Exception):
    """Something that the user can fix: a flag, a path, an archive. Its message is one clear sentence."""


class Interrupted(BaseException):
    """A signal stopped the work. What was finished is saved.

    Derived from BaseException, like KeyboardInterrupt: ``except Exception`` around code that may fail must not
    catch it.
    """


def printable(text: str) -> str:
    """Return ``text`` with escapes instead of line ends and of characters that a terminal would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def exit_on_user_error(main: Callable) -> Callable:
    """Decorate an entry point: print a :class:`UserError` as one line on stderr and exit with status 2.

    :class:`Interrupted` exits with status 75, Ctrl-C with status 130.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"ltat_fast: error: {printable(str(error))}", file=sys.stderr)
            raise SystemExit(EXIT_USER_ERROR) from None
        except Interrupted as error:
            print(f"ltat_fast: {error}; run the same command again to continue", file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED) from None
        except KeyboardInterrupt:
            print("ltat_fast: interrupted; finished work is kept", file=sys.stderr)
            raise SystemExit(EXIT_CTRL_C) from None

    return wrapper
