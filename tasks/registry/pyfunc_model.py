"""A registered model as MLflow opens it: `mlflow.pyfunc.load_model("models:/lilliput@champion-phone-4gb")`.

MLflow keeps this file and its settings beside the version ("models from code"), and runs it to open the model: nothing
is pickled. The weights lie beside it, and are checked against their sha256 first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlflow import get_registry_uri
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext  # pyright: ignore[reportPrivateImportUsage]

CHECKPOINT = "checkpoint"
_SQLITE = "sqlite:///"


class Answering(PythonModel):
    """Answers questions as the model was evaluated: its system line and chat template, greedily.

    The form that is opened lies beside this file: the compiled form if there is one, else the checkpoint.
    `load_model(…, model_config={"form": "checkpoint"})` asks for another one of `forms`, which is looked for in the
    project that holds the store, and in the working directory.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Checks the files and opens the runtime.

        Raises:
            ArtifactError: they are not here, or not those that were registered.
        """
        # Imported where they are needed: they take seconds, and MLflow runs this file when it registers the model, too.
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

    # MLflow reads the types of the questions from this signature, and leaves `params` away as here.
    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: PythonModelContext, model_input: list[str]
    ) -> list[str]:
        """An answer to each question."""
        del context
        from lilliput.chat.template import encode_prompt

        prompts = [encode_prompt(self._tokenizer, self._system_prompt, question) for question in model_input]
        return self._runtime.generate(prompts, self._max_new_tokens)


def _folder_of_version() -> Path:
    """The folder of the version: this file's, or the same one in a store that was copied from there.

    A copied store leads to the folder it was copied from until a command of Lilliput updates its paths.
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


def _places(here: Path, form: dict[str, str]) -> Iterator[Path]:
    """Where a form may lie: beside this file, in the project that holds the store, in the working directory."""
    yield here / "form"
    yield from (folder.parent / form["folder"] for folder in here.parents if folder.name == "mlruns")
    yield Path.cwd() / form["folder"]


def _verified(here: Path, name: str, form: dict[str, str]) -> Path:
    """The folder that holds the very files that were registered as `form`, every byte checked."""
    from lilliput.artifacts import read_manifest, verify
    from lilliput.errors import ArtifactError

    found = {folder: read_manifest(folder).artifact_sha256 for folder in _places(here, form) if folder.exists()}
    folder = next((folder for folder, sha256 in found.items() if sha256 == form["sha256"]), None)
    if folder is None:
        elsewhere = "".join(f"\n{folder} holds {sha256}" for folder, sha256 in found.items())
        raise ArtifactError(
            f"the form {name} of this version (sha256 {form['sha256']}) is neither in MLflow's store nor in "
            f"{Path.cwd() / form['folder']}. In a checkout of the commit that made it: `dvc pull {form['folder']}`, "
            f"then open the version there{elsewhere}"
        )
    verify(folder)
    return folder


def _verified_tokenizer(here: Path, config: dict[str, dict[str, str]]) -> Path:
    """The folder of the tokenizer, once its files are those that were registered."""
    from lilliput.artifacts import file_sha256
    from lilliput.errors import ArtifactError

    folder = here / "tokenizer"
    if not folder.exists():  # a checkpoint is what lies beside this file
        return _verified(here, CHECKPOINT, config["forms"][CHECKPOINT])  # pyright: ignore[reportArgumentType]
    for name, sha256 in config["tokenizer"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
            raise ArtifactError(f"{folder / name}: missing or altered; register the candidate again")
    return folder


set_model(Answering())
