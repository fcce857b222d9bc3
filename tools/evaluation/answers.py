"""What a model has answered: OUT/answers/rank*.jsonl, so that a stopped evaluation goes on where it was."""

import errno
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from common.errors import UserError


class Answers:
    """A line {"key", "answer", "truncated"} for each request that has been answered, by any rank.

    `truncated`: whether the request was longer than the model takes.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self.rank = folder, rank
        folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, Any] = {}
        self.truncated: set[str] = set()
        self.reload()
        self._file = open(folder / f"rank{rank}.jsonl", "ab", buffering=0)  # noqa: SIM115 (closed with the process)

    def reload(self) -> None:
        """Read what all ranks have written. Raises UserError for a damaged line."""
        for path in sorted(self.folder.glob("rank*.jsonl")):
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]  # a last line without its end was cut off by a kill
            if len(whole) < len(content) and path.name == f"rank{self.rank}.jsonl":
                os.truncate(path, len(whole))
            for number, line in enumerate(whole.splitlines(), start=1):
                try:
                    record = json.loads(line)
                    self.known[record["key"]] = record["answer"]
                    if record["truncated"]:
                        self.truncated.add(record["key"])
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{path}:{number} is damaged; remove that line, and it is computed again") from None

    def add(self, answers: dict[str, Any], truncated: Collection[str] = ()) -> None:
        """Append answers by key. Raises OSError where the disk is full."""
        records = [{"key": key, "answer": answer, "truncated": key in truncated} for key, answer in answers.items()]
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        if self._file.write(lines) != len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        self.known |= answers
        self.truncated |= set(truncated) & set(answers)
