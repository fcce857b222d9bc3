"""A model repository on the Hugging Face Hub: push a folder, pull a revision, read what is there. Not a verb.

huggingface_hub finds the Hub and the token by itself (HF_ENDPOINT, HF_TOKEN or `hf auth login`). No function here
takes, keeps or prints a token, and errors of huggingface_hub, which hold requests with their headers, end here:
what the user can fix becomes a UserError of one line, everything else, after some tries, HubUnreachable.
"""

import errno
import functools
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    is_offline_mode,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.sha import git_hash

from common.errors import UserError
from common.files import sha256_of
from common.log import log

from .shipping import check_free

Result = TypeVar("Result")

PAUSES = (1, 2, 4, 8, 16, 32)  # seconds before each further try
RETRIED = (408, 409, 412, 423, 425, 429)  # HTTP codes below 500 that may be others the next time
LONGEST_PAUSE = 300  # seconds that the Hub may ask for
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
SILENT_SECONDS = 300.0  # in which the Hub neither sends nor takes a byte; huggingface_hub would wait for ever
INDEX = "model.safetensors.index.json"
# What another export would leave behind: from_pretrained might read it beside, or instead of, the new files.
REPLACED = (
    "*.safetensors", INDEX, "*.gguf", "pytorch_model*", "tf_model*", "flax_model*", "consolidated*",
    "generation_config.json", "adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "chat_template*",
)  # fmt: skip
NOT_PUSHED = (".git", ".cache")  # folders of git and huggingface_hub in a downloaded model


class HubUnreachable(ConnectionError):
    """The Hub did not answer, or failed, at every try: the same call may work later."""


def check_repo_id(repo_id: str, revision: str | None = None) -> None:
    """Raise UserError for a name that is not org/name, for an impossible branch name, and where HF_HUB_OFFLINE is set.

    Nothing is asked of the Hub.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII):
        raise UserError(f"{repo_id!r} is not a repository's name; expected org/name, such as my-team/diffugpt")
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise UserError(f"{repo_id!r} is not a repository's name: {_one_line(error)}") from None
    if revision is not None and (".." in revision or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision, re.ASCII)):
        raise UserError(f"{revision!r} is not a revision's name; expected letters, digits, '_', '-', '.'")
    if "@" in urlsplit(constants.ENDPOINT).netloc:
        raise UserError("HF_ENDPOINT holds a user or password, which errors would print; give the token as HF_TOKEN")
    if is_offline_mode():
        raise UserError("HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set; set HF_HUB_OFFLINE=0 for this command")


def prepare(repo_id: str, private: bool = False) -> None:
    """Create the repository where it is missing, and make sure that it may be written to.

    Without `private` a new one gets the organization's default. Raises UserError where the token does not allow
    it, and where `private` is asked for and the repository is public.
    """
    check_repo_id(repo_id)
    api = _api()
    _attempt(repo_id, lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
    _attempt(repo_id, lambda: api.auth_check(repo_id, write=True))
    if private and not _attempt(repo_id, lambda: api.model_info(repo_id)).private:
        raise UserError(f"{repo_id} exists and is public; make it private in its settings, or leave out --private")


def push(
    folder: str | Path, repo_id: str, revision: str | None = None, private: bool = False, message: str | None = None
) -> str:
    """Make `revision` (None: main) hold the model in `folder`; returns the URL of the commit.

    The repository and the branch are created where they are missing; a branch starts as a copy of main. All files
    come with one commit after the uploads: a push that is killed leaves the revision as it was, and the same push
    can be made again, which uploads only what the Hub does not have yet. The commit also deletes weights and
    tokenizers that `folder` does not have, such as shards of another size; files of other kinds stay. `message` is
    the commit's title. Raises UserError for a folder that is no whole model and for what the token does not allow.
    """
    folder = Path(folder)
    check_repo_id(repo_id, revision)
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name.as_posix(): path for name, path in paths.items() if name.parts[0] not in NOT_PUSHED}
    index = json.loads(files[INDEX].read_text()) if INDEX in files else {}
    _check_complete(files, index, str(folder))
    prepare(repo_id, private)
    api = _api()
    if revision not in (None, "main"):
        _attempt(repo_id, lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))

    def commit() -> str:
        # Made anew at each try: a commit whose answer was lost is then found done, and not made twice.
        # Not upload_folder, which may spread a folder over several commits.
        there = api.list_repo_files(repo_id, revision=revision)
        deletions = [CommitOperationDelete(name) for name in there if _is_replaced(name) and name not in files]
        additions = [CommitOperationAdd(name, path) for name, path in files.items()]
        title = message or f"Upload {folder.name}"
        done = api.create_commit(repo_id, [*deletions, *additions], commit_message=title, revision=revision)
        return done.commit_url

    return _attempt(repo_id, commit)


def _is_replaced(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in REPLACED) and "/" not in name


def _check_complete(names: Collection[str], index: dict, where: str) -> None:
    """Raise UserError where a model's files are not all there. `index` is that of its shards, empty for one file."""
    if "config.json" not in names:
        raise UserError(f"{where} holds no model: config.json is missing")
    missing = sorted(set(index.get("weight_map", {}).values()) - set(names))
    if missing:
        raise UserError(f"{where} is not complete: {INDEX} names {', '.join(missing)}, which it does not hold")
    if not index and "model.safetensors" not in names:
        raise UserError(f"{where} holds no weights: neither model.safetensors nor {INDEX}")


def revisions(repo_id: str) -> dict[str, str]:
    """The repository's branches by name, and the commit that each stands at. Raises UserError where it is missing."""
    check_repo_id(repo_id)
    refs = _attempt(repo_id, lambda: _api().list_repo_refs(repo_id))
    return {branch.name: branch.target_commit for branch in refs.branches}


def read_json(repo_id: str, name: str, commit: str) -> dict:
    """A JSON file as it is in a commit; empty where the commit does not have it. It comes from the cache later on."""

    def download() -> dict:
        try:
            return json.loads(Path(_api().hf_hub_download(repo_id, name, revision=commit)).read_text())
        except RemoteEntryNotFoundError:
            return {}

    return _attempt(repo_id, download)


def pull(repo_id: str, out_dir: str | Path, revision: str | None = None) -> Path:
    """Download `revision` (None: main) to `out_dir`, which appears complete, its hashes compared; returns its path.

    Until then files come to OUT_DIR.tmp, where the same call continues after a kill. Raises UserError for an
    `out_dir` that is not empty, and for a revision that is missing or holds no whole model.
    """
    out_dir = Path(out_dir).resolve()
    check_free(out_dir)
    check_repo_id(repo_id, revision)
    api = _api()
    commit = _attempt(repo_id, lambda: api.model_info(repo_id, revision=revision)).sha
    tree = _attempt(repo_id, lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)))
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    index = read_json(repo_id, INDEX, str(commit)) if INDEX in files else {}
    _check_complete(files, index, f"{repo_id} ({revision or 'main'})")
    temporary = out_dir.with_name(out_dir.name + ".tmp")

    def download() -> None:
        api.snapshot_download(repo_id, revision=commit, local_dir=temporary)
        # where the Hub does not answer, snapshot_download takes what a former call has left for what it wants
        wrong = [name for name, entry in files.items() if not _is_whole(temporary / name, entry)]
        for name in wrong:
            (temporary / name).unlink(missing_ok=True)
        if wrong:
            raise ConnectionError(f"{len(wrong)} of {len(files)} files have not come")

    _attempt(repo_id, download)
    shutil.rmtree(temporary / ".cache", ignore_errors=True)  # what huggingface_hub notes down for continuing
    for path in [path for path in temporary.rglob("*") if path.is_file()]:
        if path.relative_to(temporary).as_posix() not in files:
            path.unlink()  # of another revision, whose pull was killed
    if out_dir.exists():
        out_dir.rmdir()
    temporary.rename(out_dir)
    return out_dir


def _is_whole(path: Path, entry: RepoFile) -> bool:
    """Whether a file has the content that the Hub lists, by its hash."""
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    return sha256_of(path) == entry.lfs.sha256 if entry.lfs else git_hash(path.read_bytes()) == entry.blob_id


@functools.cache
def _configure() -> None:
    """Once a process: the Hub may not be silent for ever, and no query of a URL, which may be signed, is logged."""

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.timeout = httpx2.Timeout(SILENT_SECONDS)
        return made

    def without_queries(record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", record.getMessage()), None
        return True

    set_client_factory(client)
    for name in ("huggingface_hub.utils._http", "httpx2"):
        logging.getLogger(name).addFilter(without_queries)


def _api() -> HfApi:
    _configure()
    return HfApi()


def _attempt(repo_id: str, call: Callable[[], Result]) -> Result:
    """Call, and after a failure of the connection or the Hub call again, after growing pauses.

    Raises UserError for what the user can fix, at once, and HubUnreachable after the last try.
    """
    for tries, pause in enumerate((*PAUSES, None), start=1):
        try:
            return call()
        except (OSError, RuntimeError, ValueError, httpx2.HTTPError, httpx2.InvalidURL) as error:
            if isinstance(error, OSError) and (error.filename or error.errno in DISK_ERRORS):  # of this machine
                raise
            mistake = _mistake(error, repo_id)
            reason, asked = _reason(error), _retry_after(error)
        if mistake:
            raise UserError(mistake)
        if pause is None:
            break
        pause = max(pause, asked)
        log.warning("%s: %s; try %d of %d in %d s", repo_id, reason, tries + 1, len(PAUSES) + 1, pause)
        time.sleep(pause)
    raise HubUnreachable(f"{repo_id}: {reason}, at each of {tries} tries")


def _mistake(error: Exception, repo_id: str) -> str | None:
    """What the user has to change; None for a failure that may pass."""
    error = _failed_request(error)
    if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol):
        return "HF_ENDPOINT is not a URL; expected the likes of https://huggingface.co, or leave it unset"
    if isinstance(error, httpx2.LocalProtocolError | UnicodeError):  # its text has the header in it
        return "the token (HF_TOKEN, or that of `hf auth login`) has characters that no token has"
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        if code >= 500 or code in RETRIED:
            return None
        if isinstance(error, RevisionNotFoundError):
            return f"{repo_id} has no such revision; its branches are on its page, under Files"
        if code == 401:
            return (
                f"the Hub gives no access to {repo_id} (401): the name is wrong, or HF_TOKEN is missing or not valid; "
                "set HF_TOKEN, or run: hf auth login"
            )
        if code == 403:
            organization = repo_id.partition("/")[0]
            return (
                f"the token may not write to {repo_id} (403); take one with the permission to write, of a member of "
                f"{organization}"
            )
        if code == 404:
            return f"{repo_id} not found (404): the name is wrong, or it is private and the token may not see it"
        return f"the Hub refuses this for {repo_id} ({code}): {error.server_message or 'no reason given'}"
    if isinstance(error, PermissionError):  # of the Xet storage
        return f"the token may not write to {repo_id}; take one with the permission to write"
    if isinstance(error, ValueError):  # a file that the Hub refuses, a card whose front matter is wrong
        return f"{repo_id}: {_one_line(error)}"
    return None


def _reason(error: Exception) -> str:
    """What happened, without the texts of others: these may hold URLs and headers."""
    error = _failed_request(error)
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answered {error.response.status_code}"
    if type(error) is ConnectionError:  # our own
        return str(error)
    return f"no connection to the Hub ({type(error).__name__})"


def _retry_after(error: Exception) -> int:
    """Seconds that the Hub asks to wait, at most LONGEST_PAUSE; 0 where it does not say."""
    error = _failed_request(error)
    said = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(int(said), LONGEST_PAUSE) if said.isdecimal() else 0


def _failed_request(error: Exception) -> Any:
    """The failed request that an error was raised because of; without one, the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError | httpx2.TransportError | httpx2.InvalidURL):
            return cause
        cause = cause.__cause__
    return error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
