"""The one exception that a user can cause."""


class UserError(Exception):
    """Something that the user can fix: the text says what was found, what was expected and what to do."""
