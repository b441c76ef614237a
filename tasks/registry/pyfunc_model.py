"""The code with which MLflow opens a model: `mlflow.pyfunc.load_model("models:/lilliput@champion-phone-4gb")`.

MLflow stores this file with its configuration and a copy of Lilliput's library beside the version ("models from code")
and runs it, so nothing is pickled and no checkout is needed. The weights are stored beside it and checked against their
sha256 first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlflow import get_registry_uri
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext  # pyright: ignore[reportPrivateImportUsage]

CHECKPOINT = "checkpoint"
_SQLITE = "sqlite:///"


class LilliputModel(PythonModel):
    """Answers questions as in the evaluation: same system prompt and chat template, greedy decoding.

    Opens the form beside this file: the compiled model if there is one, otherwise the checkpoint.
    `load_model(…, model_config={"form": "checkpoint"})` selects another form, which is searched for in the project
    that holds the store and in the working directory.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Checks the files and opens the runtime.

        Raises:
            ArtifactError: the files are missing, or not the registered ones.
        """
        # Imported here because it takes seconds, and MLflow also runs this file when it registers the model.
        from transformers import AutoTokenizer

        config = context.model_config
        assert config is not None
        here = _folder_of_version()
        self._system_prompt, self._max_new_tokens = config["system_prompt"], config["max_new_tokens"]
        folder = _verified(here, config["form"], config["forms"][config["form"]])
        tokenizer = folder if config["form"] == CHECKPOINT else _verified_tokenizer(here, config)
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if config["form"] == CHECKPOINT:
            from lilliput.models import open_model
            from lilliput.runtime.torch import TorchRuntime

            self._runtime = TorchRuntime(*open_model(folder), batch_size=8)
        else:
            from lilliput.runtime.compiled import open_compiled

            self._runtime = open_compiled(config["form"], folder, config["threads"], config["context_tokens"])

    # MLflow reads the input types from this signature, which may omit `params`.
    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: PythonModelContext, model_input: list[str]
    ) -> list[str]:
        """Returns an answer to each question."""
        del context
        from lilliput.chat.template import encode_prompt

        prompts = [encode_prompt(self._tokenizer, self._system_prompt, question) for question in model_input]
        return self._runtime.generate(prompts, self._max_new_tokens)


def _folder_of_version() -> Path:
    """Returns the folder of the version: that of this file, or its counterpart in a copied store.

    A copied store points to the original folder until a command of Lilliput updates its paths.
    """
    here, address = Path(__file__).absolute().parent, get_registry_uri()
    if not address.startswith(_SQLITE):
        return here
    database = Path(address.removeprefix(_SQLITE)).absolute()
    original = next((folder for folder in here.parents if (folder / database.name).is_file()), None)
    if original is None or original == database.parent:
        return here
    copy = database.parent / here.relative_to(original)
    return copy if copy.exists() else here


def _candidate_folders(here: Path, form: dict[str, str]) -> Iterator[Path]:
    """Yields the possible folders of a form: beside this file, in the store's project, in the working directory."""
    yield here / "form"
    yield from (folder.parent / form["folder"] for folder in here.parents if folder.name == "mlruns")
    yield Path.cwd() / form["folder"]


def _verified(here: Path, name: str, form: dict[str, str]) -> Path:
    """Returns the folder of the registered form `name` after checking all of its files."""
    from lilliput.artifacts import read_manifest, verify
    from lilliput.errors import ArtifactError

    present = {path: read_manifest(path).artifact_sha256 for path in _candidate_folders(here, form) if path.exists()}
    folder = next((folder for folder, sha256 in present.items() if sha256 == form["sha256"]), None)
    if folder is None:
        elsewhere = "".join(f"\n{folder} holds {sha256}" for folder, sha256 in present.items())
        raise ArtifactError(
            f"the form {name} of this version (sha256 {form['sha256']}) is neither in MLflow's store nor in "
            f"{Path.cwd() / form['folder']}. In a checkout of the commit that made it: `dvc pull {form['folder']}`, "
            f"then open the version there{elsewhere}"
        )
    verify(folder)
    return folder


def _verified_tokenizer(here: Path, config: dict[str, dict[str, str]]) -> Path:
    """Returns the folder of the tokenizer after checking that its files are the registered ones."""
    from lilliput.artifacts import file_sha256
    from lilliput.errors import ArtifactError

    folder = here / "tokenizer"
    if not folder.exists():  # the form beside this file is the checkpoint
        return _verified(here, CHECKPOINT, config["forms"][CHECKPOINT])  # pyright: ignore[reportArgumentType]
    for name, sha256 in config["tokenizer"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
            raise ArtifactError(f"{folder / name}: missing or altered; register the candidate again")
    return folder


set_model(LilliputModel())
