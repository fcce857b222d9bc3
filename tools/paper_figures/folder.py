"""A folder of measured points, which a stopped command continues: FOLDER/NAME.json beside its figure and its table."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_atomically


class PointFolder:
    """Points by key, with the settings that all of them share, since points of other settings cannot be compared.

    Each point is on disk before the next is measured. What a later command adds stands beside what is there.
    """

    def __init__(self, path: str | Path, name: str, settings: dict[str, Any]):
        """Raises UserError where `path` is no folder, or holds points of other settings."""
        self.path, self.name, self.settings = Path(path), name, settings
        self.points: dict[str, dict[str, Any]] = {}
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {path} is a file, expected a folder")
        if self.file.exists():
            self._read()

    @property
    def file(self) -> Path:
        """Where the points are."""
        return self.path / f"{self.name}.json"

    def _read(self) -> None:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            settings, points = found["settings"], found["points"]
            self.points = {key_of(point["point"]): point for point in points}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} is no file of this command ({error!r}); choose another --output") from None
        for name in {**settings, **self.settings}:
            if settings.get(name) != self.settings.get(name):
                raise UserError(
                    f"{self.file} has points of {name} {settings.get(name)!r}, and this command asks for "
                    f"{self.settings.get(name)!r}, which cannot be compared; choose another --output"
                )

    def missing(self, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those that are to be measured. Raises UserError where a checkpoint is not the one that was measured."""
        known = {p["point"]["checkpoint"]: p["point"]["identity"] for p in self.points.values()}
        for point in points:
            if known.get(point["checkpoint"], point["identity"]) != point["identity"]:
                raise UserError(
                    f"{point['checkpoint']} is not what it was when {self.file} was written; choose another --output"
                )
        return [point for point in points if key_of(point) not in self.points]

    def add(self, point: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep what was measured of a point."""
        self.points[key_of(point)] = {"point": point, **result}
        content = {"settings": self.settings, "points": list(self.points.values())}
        write_atomically(self.file, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())

    def complete(
        self,
        points: list[dict[str, Any]],
        measure: Callable[[list[dict[str, Any]]], None],
        page: Callable[[list[dict[str, Any]], dict[str, Any]], str],
        figure: Callable[[list[dict[str, Any]], dict[str, Any], Path], None],
    ) -> None:
        """Measure what is missing, write the page and the figure of all that is there, and print where they are.

        Raises UserError where the folder cannot be used.
        """
        self.missing(points)
        with self.locked():
            missing = self.missing(points)
            if missing:
                measure(missing)
            found = list(self.points.values())
            self.file.with_suffix(".md").write_text(page(found, self.settings), encoding="utf-8")
            figure(found, self.settings, self.file.with_suffix(".png"))
        print(f"{len(missing)} points measured, {len(points) - len(missing)} were there")
        for suffix in (".json", ".md", ".png"):
            print(self.file.with_suffix(suffix))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands out of the folder. Raises UserError where one is in it already, or it cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {self.path} cannot be made: {error.strerror}") from None
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise UserError(f"another process writes to {self.path}") from None
        try:
            if self.file.exists():  # what another has added since
                self._read()
            yield
        finally:
            os.close(handle)


def key_of(point: dict[str, Any]) -> str:
    """Points with the same description are the same."""
    return json.dumps(point, sort_keys=True)
