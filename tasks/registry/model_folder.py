"""The folder of a model version in MLflow's store: the code that opens the model, and its weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

import lilliput
from lilliput.artifacts import link_or_copy, read_manifest, write_json, writing
from lilliput.compile.tokenizer_files import TOKENIZER_FILES
from lilliput.config import Params
from tasks import layout
from tasks.records import device_record
from tasks.registry.get_or_create import active_run_id
from tasks.registry.moved import local_path

MODEL_FOLDER = "model"
DIGEST_TAG = "lilliput.mlmodel_sha256"
PYFUNC_FILE = Path(__file__).with_name("pyfunc_model.py")
CHECKPOINT = "checkpoint"
FORM, TOKENIZER = "form", "tokenizer"  # folders beside the MLmodel
CONTEXT_TOKENS = 2048  # of prompt and answer, for a registered model in its compiled form
_PREFERRED_FORMS = ("gguf", "onnx")
# Of Lilliput's code, which is stored beside the model, to open and ask it.
REQUIREMENTS = (
    *("mlflow", "torch", "transformers", "xllamacpp", "onnxruntime-genai", "safetensors", "peft", "numpy"),
    *("pydantic", "ruamel.yaml", "jinja2", "jsonschema_rs", "httpx", "psutil", "tqdm", "gguf"),
)
_EXAMPLE = ["What is the capital of Peru?"]
_CODE = Path(lilliput.__file__).parent
_UPLOAD_TIMEOUT_S = 600  # for one file of weights, which the server receives before it stores it


def model_uri(client: MlflowClient, run_id: str) -> str:
    """Returns the address of the folder that `add_model` fills."""
    return f"{client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}"


def add_model(client: MlflowClient, version: str, params: Params, name: str) -> None:
    """Fills the folder of `version`. Idempotent for the same content.

    The folder holds an MLmodel with an example of the input, pyfunc_model.py, Lilliput's library, the default form of
    the candidate (the compiled model if there is one, otherwise the checkpoint) and its tokenizer. In a store on this
    file system the weights are hard links.

    Args:
        client: client of the store.
        version: a version that was created with `model_uri` of its run as source.
        params: settings of the project.
        name: name of the candidate.
    """
    config = pyfunc_config(params, name)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + PYFUNC_FILE.read_bytes()).hexdigest()
    run_id = active_run_id(client, version)
    if client.get_run(run_id).data.tags.get(DIGEST_TAG) == digest:
        return
    _add_files(client, run_id, FORM, Path(config["forms"][config["form"]]["folder"]))
    if config["form"] != CHECKPOINT:
        _add_tokenizer(client, run_id, layout.model(name), config["tokenizer"])
    with tempfile.TemporaryDirectory() as scratch:
        write_mlmodel(Path(scratch, MODEL_FOLDER), config)
        client.log_artifacts(run_id, str(Path(scratch, MODEL_FOLDER)), MODEL_FOLDER)
    client.set_tag(run_id, DIGEST_TAG, digest)


def pyfunc_config(params: Params, name: str) -> dict[str, Any]:
    """Returns the configuration of pyfunc_model.py: the forms of `name` with their sha256, and how to prompt them."""
    compiled = {
        config.target: layout.compiled(name, config.target)
        for key, config in params.compile.items()
        if config.candidate == name and device_record(params, key)
    }
    forms = {
        form: {"folder": str(folder), "sha256": read_manifest(folder).artifact_sha256}
        for form, folder in {CHECKPOINT: layout.model(name), **compiled}.items()
    }
    files = read_manifest(layout.model(name)).files
    return {
        "form": next((form for form in _PREFERRED_FORMS if form in forms), CHECKPOINT),
        "forms": forms,
        "tokenizer": {file: sha256 for file, sha256 in files.items() if _of_tokenizer(file)},
        "system_prompt": params.data.system_prompt,
        "max_new_tokens": params.evaluation.max_new_tokens,
        "threads": params.evaluation.timed_threads,
        "context_tokens": CONTEXT_TOKENS,
    }


def write_mlmodel(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes to `folder` what MLflow opens as Python code: an MLmodel, pyfunc_model.py and its `config`."""
    from mlflow import pyfunc  # imports pandas and scikit-learn
    from mlflow.models import Model

    requirements = [f"{name}=={_public_version(name)}" for name in REQUIREMENTS]
    pyfunc.save_model(
        str(folder),
        python_model=str(PYFUNC_FILE),
        model_config=dict(config),
        pip_requirements=requirements,
        code_paths=[str(_CODE)],
    )
    model = Model.load(str(folder))
    model.saved_input_example_info = _write_example(folder)
    # MLflow writes the absolute path of this checkout, but reads only the file name.
    model.flavors["python_function"]["model_code_path"] = PYFUNC_FILE.name
    model.save(str(folder / "MLmodel"))


def _public_version(package: str) -> str:
    """Returns the installed version without its local part: package indexes have `2.13.0`, not `2.13.0+cpu`."""
    return importlib.metadata.version(package).partition("+")[0]


def _write_example(folder: Path) -> dict[str, str]:
    """Writes an example of the input. MLflow would ask the model to check it, but its weights are not there yet."""
    write_json(folder / "input_example.json", _EXAMPLE)
    write_json(folder / "serving_input_example.json", {"inputs": _EXAMPLE})
    names = {"artifact_path": "input_example.json", "serving_input_path": "serving_input_example.json"}
    return {"type": "json_object", **names}


def _of_tokenizer(file: str) -> bool:
    return any(Path(file).match(pattern) for pattern in TOKENIZER_FILES)


def _add_tokenizer(client: MlflowClient, run_id: str, checkpoint: Path, files: Mapping[str, str]) -> None:
    # On the disk of the checkpoint, so that hard links are possible.
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".tokenizer-") as scratch:
        for file in files:
            link_or_copy(checkpoint / file, Path(scratch, file))
        _add_files(client, run_id, TOKENIZER, Path(scratch))


def _add_files(client: MlflowClient, run_id: str, place: str, folder: Path) -> None:
    """Puts the files of `folder` into the subfolder `place` of the model: links in a local store, otherwise uploads."""
    store = local_path(client.get_run(run_id).info.artifact_uri)
    if store is None:
        with _long_timeout():
            client.log_artifacts(run_id, str(folder), f"{MODEL_FOLDER}/{place}")
        return
    target = store / MODEL_FOLDER / place
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target) as partial:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            copy = partial / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, copy)


@contextmanager
def _long_timeout() -> Iterator[None]:
    """Raises the HTTP timeout, because MLflow's server answers only after it has stored a large file."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = str(max(_UPLOAD_TIMEOUT_S, int(before or 0)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
