"""What tests push: a finished run, folders that look like exports, and what stands on the Hub afterwards."""

import json
import shutil
from pathlib import Path

from hub_server import READER, SIGNATURE, WRITER, HubServer

REPO = "team/model"
SECRETS = (WRITER, READER, SIGNATURE)


def model(folder: Path, step: int, shards: int = 1) -> Path:
    """A folder that looks like an export; the weights are a few bytes that depend on the step."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "diffusion": {"step": step}}))
    (folder / "README.md").write_text(f"---\nlibrary_name: transformers\n---\nAfter {step} steps\n")
    names = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    for name in names if shards > 1 else ["model.safetensors"]:
        (folder / name).write_bytes(f"{name} of step {step}".encode() * 50)
    if shards > 1:
        index = {"weight_map": {f"weight_{n}": name for n, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_hub(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    """All files but the one that a new repository has."""
    return {name: content for name, content in hub.files(REPO, revision).items() if name != ".gitattributes"}


def assert_no_secret(*texts: str | bytes) -> None:
    for text in texts:
        for secret in SECRETS:
            assert secret.encode() not in (text.encode() if isinstance(text, str) else text)


def delete_after(run: Path, step: int) -> None:
    """As if it had been killed just after that step's checkpoint."""
    for folder in (run / "checkpoints").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
