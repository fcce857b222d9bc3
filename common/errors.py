"""The one exception that a user can cause, and what its text must not say."""

import re


class UserError(Exception):
    """Something that the user can fix: the text says what was found, what was expected and what to do."""


def without_passwords(text: str) -> str:
    """`text` without the user:password@ of its URLs."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)
