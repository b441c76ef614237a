"""A registered model as MLflow opens it: `mlflow.pyfunc.load_model("models:/lilliput@champion-phone-4gb")`.

MLflow keeps this file and its settings beside the version ("models from code"), and runs it to open the model: nothing
is pickled, and the weights stay where the pipeline made them. They are checked against their sha256 first.
"""

from __future__ import annotations

from pathlib import Path

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext  # pyright: ignore[reportPrivateImportUsage]

CHECKPOINT = "checkpoint"


class Answering(PythonModel):
    """Answers questions as the model was evaluated: its system line and chat template, greedily.

    What is opened is `form`: the compiled form if there is one, else the checkpoint.
    `load_model(…, model_config={"form": "checkpoint"})` asks for another one of `forms`. They are looked for in
    `project`, where they were registered, and in the working directory: on another machine a checkout that has them.
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
        checkpoint = _registered(config["project"], config["forms"][CHECKPOINT])
        self._system_prompt, self._max_new_tokens = config["system_prompt"], config["max_new_tokens"]
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        if config["form"] == CHECKPOINT:
            from lilliput.models import open_model
            from lilliput.runtime.torch import TorchRuntime

            self._runtime = TorchRuntime(*open_model(checkpoint), batch_size=8)
        else:
            from lilliput.runtime.compiled import open_compiled

            folder = _registered(config["project"], config["forms"][config["form"]])
            self._runtime = open_compiled(config["form"], folder, config["threads"], config["context_tokens"])

    # MLflow reads the types of the questions from this signature, and leaves `params` away as here.
    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: PythonModelContext, model_input: list[str]
    ) -> list[str]:
        """An answer to each question."""
        del context
        from lilliput.data.chat import encode_prompt

        prompts = [encode_prompt(self._tokenizer, self._system_prompt, question) for question in model_input]
        return self._runtime.generate(prompts, self._max_new_tokens)


def _registered(project: str, form: dict[str, str]) -> Path:
    """The folder of a form, once it holds the very files that were registered."""
    from lilliput.artifacts import verify
    from lilliput.errors import ArtifactError

    places = [Path(project, form["folder"]), Path.cwd() / form["folder"]]
    folder = next((place for place in places if place.exists()), None)
    if folder is None:
        raise ArtifactError(
            f"{form['folder']} lies neither in {project}, where it was registered, nor in {Path.cwd()}; in a checkout "
            f'of that commit: `dvc pull {form["folder"]}`, then open it there, or with model_config={{"project": …}}'
        )
    if (found := verify(folder).artifact_sha256) != form["sha256"]:
        raise ArtifactError(
            f"{folder}: holds {found}, registered was {form['sha256']}; it was made again since. Open a newer version, "
            "or bring the registered files back (`git checkout`, `dvc checkout`)"
        )
    return folder


set_model(Answering())
