"""What every command line of the project has in common: a help page, one-line errors and exit codes.

    @command
    def main(argv: list[str] | None = None) -> int:
        args = make_parser("python -m tools.export", __doc__).parse_args(argv)

    if __name__ == "__main__":
        sys.exit(main())

Exit codes: 0 done, 1 the machine failed (a full disk), 2 the user can fix it, 130 interrupted.
"""

import argparse
import functools
import logging
from collections.abc import Callable

from .errors import UserError
from .log import log, set_up_logging, this_rank

Main = Callable[..., int]  # main(argv: list[str] | None = None)


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """An argument parser whose help page shows the module's docstring as it is written."""
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def command(main: Callable[..., int]) -> Main:
    """Decorate a `main(argv)`: logging is set up, and what the user can fix becomes one line and exit code 2."""
    return _run(main, "")


def resumable_command(main: Callable[..., int]) -> Main:
    """As `command`, for a `main` that continues where it stopped: its messages say so."""
    return _run(main, "; finished work is kept, and the same command continues from there")


def _run(main: Callable[..., int], hint: str) -> Main:
    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        set_up_logging()
        try:
            return main(argv)
        except UserError as error:
            # all ranks raise the same error; rank 0 speaks for them
            log.log(logging.ERROR if this_rank() == 0 else logging.INFO, "%s", error)
            return 2
        except OSError as error:
            if not hint:
                raise
            log.error("%s%s", error, hint)
            return 1
        except KeyboardInterrupt:
            log.error("interrupted%s", hint)
            return 130

    return run
