"""One module a verb: `python -m tools.<verb> --help`."""
