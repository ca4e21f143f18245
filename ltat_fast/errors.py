"""The one error type a user is meant to read."""


class UserError(Exception):
    """Something the user can mend: a flag, a path, an archive. Its message is one clear sentence.

    The command-line entry points print it without a traceback and exit with status 2 (:func:`exit_on_user_error`).
    """


def exit_on_user_error(main):
    """Decorate an entry point: a :class:`UserError` becomes one line on stderr and exit status 2; Ctrl-C gives 130."""
    import functools
    import sys

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"ltat_fast: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("ltat_fast: interrupted; what is finished is kept", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapper
