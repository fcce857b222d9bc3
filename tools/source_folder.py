"""The folder that a user names: on this machine, or on the Hub. Not a verb."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from common.errors import UserError, without_passwords

from .decoding import why

HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]


def source_folder(source: str | Path) -> Path:
    """The folder that `source` is, or the Hub's snapshot of that name. Raises UserError where there is neither."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_NAME.fullmatch(str(source)):
        raise UserError(f"{source} is no folder; expected one, or a name on the Hub such as diffusionfamily/diffugpt-s")
    try:
        found = Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
        if not list(found.glob("*.safetensors")):
            found = Path(snapshot_download(str(source), allow_patterns=[*HUB_FILES, "*.bin"]))
    except (OSError, ValueError) as error:
        reason = without_passwords(why(error))
        raise UserError(f"{source} is no folder, and the Hub does not give it: {reason}") from None
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError where there is no such file or it is no JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} not found; expected a folder that from_pretrained would load") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected an object with settings")
    return content
