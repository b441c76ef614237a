"""Reads a dataset of the Hugging Face hub at a pinned commit; no code of the dataset is run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from lilliput.errors import SourceError
from lilliput.hub import translate_hub_errors
from lilliput.ingestion.raw_rows import RawRow, arrow_rows, sides

_BATCH_ROWS = 256


def read_hub(source: str) -> Iterator[RawRow]:
    """Yields the rows of `hub:<org>/<dataset>@<commit>`, optionally with `?config=<name>&split=<name>`.

    Without `split`, the rows of the splits `train` and `test` stay on their side, and a single split is drawn from.

    Raises:
        SourceError: the dataset cannot be fetched, or a config or split has to be chosen.
    """
    import datasets
    import huggingface_hub

    # Bars and notes about the dataset's card would stand between the messages of the flow.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    reference, _, query = source.removeprefix("hub:").partition("?")
    options = dict(parse_qsl(query))
    repository, _, commit = reference.partition("@")
    splits = _load(source, repository, commit, options.get("config"))
    _require_commit(source, splits, commit)
    for name, side in sides(_chosen(source, options.get("split"), list(splits))).items():
        batches = (_rows(batch) for batch in splits[name].iter(batch_size=_BATCH_ROWS))
        yield from arrow_rows(batches, f"{reference} {name}", side)


def _load(source: str, repository: str, commit: str, config: str | None) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with translate_hub_errors("data.source", source):
            return datasets.load_dataset(repository, name=config, revision=commit)
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:
        raise SourceError(
            f"data.source: {source} cannot be read ({_first_line(error)}); choose a config by `?config=<name>`, or "
            "download the files and name their folder"
        ) from None


def _require_commit(source: str, splits: Any, commit: str) -> None:
    """Rejects another commit: if the hub does not answer, `datasets` opens the latest one that is in its cache."""
    for split in splits.values():
        for file in split.cache_files:
            if commit not in Path(file["filename"]).parts:
                raise SourceError(
                    f"data.source: {source} cannot be fetched, and the cache has another commit only; check the "
                    "network, or unset HF_HUB_OFFLINE",
                    temporary=True,
                )


def _chosen(source: str, split: str | None, names: list[str]) -> list[str]:
    """Returns the splits to read."""
    if split in names:
        return [split]
    if split is None and (len(names) == 1 or set(names) == {"train", "test"}):
        return sorted(names, reverse=True)  # train first
    raise SourceError(
        f"data.source: {source} has the splits {', '.join(names)}; choose one by `?split=<name>`"
        + (f", {split!r} is none of them" if split else "")
    )


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
