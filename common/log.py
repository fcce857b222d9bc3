"""One logger for the whole project: to the terminal, above any progress bar. Ranks above 0 only report errors.

from common.log import log
log.info("resuming from step %d", step)
log.warning("step %d is not saved", step)      # printed as "warning: step ..."
"""

import logging
import os
import sys

from tqdm import tqdm

log = logging.getLogger("diffullama")


def this_rank() -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


class RankFilter(logging.Filter):
    """Lets rank 0 speak. Other ranks are heard only when something failed."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or this_rank() == 0


class TerminalHandler(logging.Handler):
    """Errors go to stderr, the rest to stdout; a progress bar is redrawn below the line."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        tqdm.write(prefix + record.getMessage(), file=stream)
        stream.flush()


def set_up_logging() -> None:
    """Send the project's log to the terminal. Calling it again changes nothing."""
    if not any(isinstance(handler, TerminalHandler) for handler in log.handlers):
        handler = TerminalHandler()
        handler.addFilter(RankFilter())
        log.addHandler(handler)
        log.setLevel(logging.INFO)
