"""Reads again what could not be read: a network or a disk may have failed for a moment."""

import time
from collections.abc import Callable
from typing import TypeVar

from common.log import log

from .inputs.files import ReadFailed

Result = TypeVar("Result")

sleep = time.sleep  # seconds; tests do not wait


def with_retries(function: Callable[[], Result], retries: int, what: str) -> Result:
    """The function's result; after a ReadFailed it is called again, `retries` times, after 1, 2, 4, ... seconds.

    Raises the last ReadFailed, and at once whatever else the function raises.
    """
    for attempt in range(retries):
        try:
            return function()
        except ReadFailed as error:
            seconds = 2**attempt
            log.warning("%s; %s again in %d s (%d of %d)", error, what, seconds, attempt + 1, retries)
            sleep(seconds)
    return function()
