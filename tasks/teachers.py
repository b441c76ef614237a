"""Folders of teachers: an ancestor's artefact, or a pinned model outside the graph, fetched once."""

from __future__ import annotations

from pathlib import Path

from lilliput.artifacts import file_sha256, read_manifest, remove, seal, verify, writing
from lilliput.config import SourceConfig
from lilliput.config.strategies import is_external_teacher
from lilliput.errors import SourceError
from lilliput.source import fetch_source
from lilliput.wheels import default_cache
from tasks import layout


def teacher_folder(teacher: str) -> Path:
    """Returns the folder of `teacher`, an ancestor or a pinned model, which `fetch_teacher` fills."""
    return layout.external_teacher(teacher) if is_external_teacher(teacher) else layout.model(teacher)


def fetch_teacher(teacher: str) -> None:
    """Fetches `teacher` if it is a pinned model whose verified files are not here.

    Raises:
        SourceError: it cannot be fetched, or is not in safetensors.
        ArtifactError: it contains a pickle or code, or its fetched files were altered.
    """
    if not is_external_teacher(teacher):
        return
    folder = teacher_folder(teacher)
    if folder.exists() and (teacher.startswith("hub:") or _is_current(folder, Path(teacher.removeprefix("path:")))):
        verify(folder)
        return
    remove(folder)
    with writing(folder) as directory:
        try:
            fetch_source(SourceConfig(model=teacher), directory, default_cache())
        except SourceError as error:
            raise SourceError(f"teacher: {error}", temporary=error.temporary) from None
        if not [*directory.glob("*.safetensors")]:
            raise SourceError(f"teacher: {teacher} has no .safetensors file; choose a release in safetensors")
        seal(directory, candidate=teacher, strategy="fetch", config={}, parent=None, parameters=0, facts={})


def _is_current(folder: Path, source: Path) -> bool:
    """Whether the copy in `folder` has the bytes of the local folder `source`."""
    source = source.expanduser()
    files = read_manifest(folder).files.items()
    return all((source / name).is_file() and file_sha256(source / name) == sha256 for name, sha256 in files)
