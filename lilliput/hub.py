"""Models of the Hugging Face hub: the commit of a name without one, downloads, and one message for each error."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lilliput.artifacts import disk_is_full, file_sha256, write_json
from lilliput.errors import SourceError

_ANSWER_S = 30.0  # limit for one answer about a name


def commit_of(model: str, record: Path) -> str:
    """Returns `model`, `hub:<org>/<model>` or `…@<branch or tag>`, with the commit in place of the branch or tag.

    The first call asks the hub and writes the answer to the file `record`; later calls read it there, so that a name
    means the same commit until its line is removed.

    Raises:
        SourceError: the hub does not know the name, does not give it to this user, or does not answer; or `record` is
            damaged.
    """
    commits = _read(record)
    if model not in commits:
        repository, _, revision = model.removeprefix("hub:").partition("@")
        commits[model] = _resolve(model, repository, revision or None)
        write_json(record, dict(sorted(commits.items())))
    return f"{model.partition('@')[0]}@{commits[model]}"


def _read(record: Path) -> dict[str, str]:
    """Returns the commits in `record` by name; none if it does not exist."""
    if not record.exists():
        return {}
    try:
        commits = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        commits = None
    if not isinstance(commits, dict) or not all(_is_commit(value) for value in commits.values()):
        raise SourceError(
            f"{record}: not a JSON object with a commit of 40 digits for each name; correct it, or remove it to "
            "resolve the names again"
        )
    return commits


def _is_commit(value: object) -> bool:
    return isinstance(value, str) and len(value) == 40 and set(value) <= set("0123456789abcdef")


def _resolve(model: str, repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    with translate_hub_errors("source.model", model):
        commit = HfApi().model_info(repository, revision=revision, timeout=_ANSWER_S).sha
    if not _is_commit(commit):
        raise SourceError(f"source.model: {model}: the hub names no commit; write hub:{repository}@<commit>")
    return str(commit)


def download_snapshot(model: str, patterns: Sequence[str]) -> Path:
    """Downloads the files of `hub:<org>/<model>@<commit>` that match `patterns` into the hub's own cache.

    Returns:
        The folder with links to the files; `require_sum` checks their contents.

    Raises:
        SourceError: they cannot be fetched. Complete files are kept, and the next call fetches the others.
    """
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # warnings about attempts would stand beside the one message
    repository, _, commit = model.removeprefix("hub:").partition("@")
    with translate_hub_errors("source.model", model):
        return Path(huggingface_hub.snapshot_download(repo_id=repository, revision=commit, allow_patterns=[*patterns]))


def require_sum(path: Path) -> None:
    """Raises SourceError if a file of the hub's cache does not match its name: its sha256, or git's sha1 if small."""
    blob = path.resolve()
    if len(blob.name) == 64:
        actual = file_sha256(blob)
    elif len(blob.name) == 40:
        content = blob.read_bytes()
        actual = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    else:
        return  # a cache without links has no sums
    if actual != blob.name:
        raise SourceError(
            f"{blob}: altered or truncated (its sum is {actual}); delete it, and the next run downloads it again"
        )


@contextmanager
def translate_hub_errors(key: str, name: str) -> Iterator[None]:
    """Raises an error of the libraries `huggingface_hub` and `datasets` about the hub as one message with a remedy.

    Args:
        key: the setting that names the model or dataset.
        name: its value.

    Raises:
        SourceError: the block raised such an error; other errors pass through.
    """
    try:
        yield
    except Exception as error:
        if problem := _problem(error, name):
            text, temporary = problem
            raise SourceError(f"{key}: {name} {text}", temporary=temporary) from None
        raise


def _problem(error: Exception, name: str) -> tuple[str, bool] | None:
    """Returns what is wrong and the remedy, and whether another attempt may succeed; None for an unrelated error."""
    from huggingface_hub import errors

    chain = [*_causes(error)]
    reason = f"{type(error).__name__}: {_first_line(error)}"

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

    if any(isinstance(cause, OSError) and disk_is_full(cause) for cause in chain):
        return None  # every stage reports a full disk in the same words
    if has(errors.GatedRepoError):
        return (
            "is gated: its publisher gives it only to accounts that accepted its terms. Accept them on its page "
            f"{_page(name)}, and set HF_TOKEN to a token of that account",
            False,
        )
    missing = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.RemoteEntryNotFoundError,
        errors.DisabledRepoError,
        errors.HFValidationError,
    )
    if has(*missing) or type(error).__name__ == "DatasetNotFoundError":
        return (
            f"is not on the hub, or is private ({reason}); correct the name or the commit, or set HF_TOKEN to a token "
            "of an account that may read it",
            False,
        )
    http_error: type[Exception] = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    if has(errors.OfflineModeIsEnabled) or (os.environ.get("HF_HUB_OFFLINE") == "1" and has(http_error, OSError)):
        return "is not complete in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it; unset HF_HUB_OFFLINE", True
    if has(http_error, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) or _is_cut(error):
        return (
            f"cannot be fetched: the hub does not answer, or the download broke off ({reason}). Check the network and "
            "run the same command again, which fetches the missing files only; or download the files and name their "
            "folder",
            True,
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_cut(error: Exception) -> bool:
    """Whether a file arrived in another size than the hub stated."""
    return "Consistency check failed" in str(error)


def _page(name: str) -> str:
    from huggingface_hub.constants import ENDPOINT

    kind = "datasets/" if "?" in name else ""
    return f"{ENDPOINT}/{kind}{name.removeprefix('hub:').partition('@')[0]}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]
