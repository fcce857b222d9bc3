"""Help pages of several commands from one process, which imports their libraries once.

    python tests/scripts/help_pages.py '["pretrain/main.py", "-m data_prep prepare"]'

Prints JSON: of each command {"code": its exit code, "page": what it printed}.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path


def page(words: list[str]) -> dict:
    """What `python WORDS --help` prints."""
    printed, code = io.StringIO(), 0
    module = words[0] == "-m"
    sys.argv = [*words[module:], "--help"]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            if module:
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.path[0] = str(Path(words[0]).resolve().parent)
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return {"code": code, "page": printed.getvalue()}


if __name__ == "__main__":
    commands = json.loads(sys.argv[1])
    print(json.dumps({command: page(command.split()) for command in commands}))
