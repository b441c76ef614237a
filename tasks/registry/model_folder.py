"""The folder of a model version in MLflow's store: what opens the model, and the weights it opens."""

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

from lilliput.artifacts import TOKENIZER_FILES, link_or_copy, read_manifest, writing
from lilliput.config import Params
from tasks import layout
from tasks.records import device_record
from tasks.registry.creating import run_of
from tasks.registry.moved import local_path

MODEL_FOLDER = "model"
DIGEST_TAG = "lilliput.mlmodel_sha256"
ANSWERING = Path(__file__).with_name("pyfunc_model.py")
CHECKPOINT = "checkpoint"
FORM, TOKENIZER = "form", "tokenizer"  # folders beside the MLmodel
CONTEXT_TOKENS = 2048  # of prompt and answer, where a registered model is opened in its compiled form
_OPENED_FIRST = ("gguf", "onnx")
_NEEDED = ("mlflow", "torch", "transformers", "xllamacpp", "onnxruntime-genai")
_UPLOAD_S = 600  # for one file of weights, which a server first receives and then stores


def model_uri(client: MlflowClient, run_id: str) -> str:
    """The address of the folder that `add_model` fills."""
    return f"{client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}"


def add_model(client: MlflowClient, version: str, params: Params, name: str) -> None:
    """Fills the folder of `version`, once for the same content.

    It holds an MLmodel, pyfunc_model.py, the form of the candidate that is opened (compiled if there is one, else
    the checkpoint) and its tokenizer. In a store on this file system the weights are hard links to the project's.

    Args:
        client: of the store.
        version: created with `model_uri` of its run as source.
        params: of the project.
        name: of the candidate.
    """
    config = describe(params, name)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + ANSWERING.read_bytes()).hexdigest()
    run_id = run_of(client, version)
    if client.get_run(run_id).data.tags.get(DIGEST_TAG) == digest:
        return
    _add_files(client, run_id, FORM, Path(config["forms"][config["form"]]["folder"]))
    if config["form"] != CHECKPOINT:
        _add_tokenizer(client, run_id, layout.model(name), config["tokenizer"])
    with tempfile.TemporaryDirectory() as scratch:
        write_mlmodel(Path(scratch, MODEL_FOLDER), config)
        client.log_artifacts(run_id, str(Path(scratch, MODEL_FOLDER)), MODEL_FOLDER)
    client.set_tag(run_id, DIGEST_TAG, digest)


def describe(params: Params, name: str) -> dict[str, Any]:
    """The configuration of pyfunc_model.py: the forms of `name` by sha256, and how the model is asked."""
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
        "form": next((form for form in _OPENED_FIRST if form in forms), CHECKPOINT),
        "forms": forms,
        "tokenizer": {file: sha256 for file, sha256 in files.items() if _of_tokenizer(file)},
        "system_prompt": params.data.system_prompt,
        "max_new_tokens": params.evaluation.max_new_tokens,
        "threads": params.evaluation.timed_threads,
        "context_tokens": CONTEXT_TOKENS,
    }


def write_mlmodel(folder: Path, config: Mapping[str, Any]) -> None:
    """Makes `folder` one that MLflow opens as Python code: an MLmodel, pyfunc_model.py and its `config`."""
    from mlflow import pyfunc  # brings pandas and scikit-learn
    from mlflow.models import Model

    needed = [f"{name}=={importlib.metadata.version(name)}" for name in _NEEDED]
    pyfunc.save_model(str(folder), python_model=str(ANSWERING), model_config=dict(config), pip_requirements=needed)
    model = Model.load(str(folder))
    # MLflow writes the absolute path of this checkout, and reads the name of the file alone.
    model.flavors["python_function"]["model_code_path"] = ANSWERING.name
    model.save(str(folder / "MLmodel"))


def _of_tokenizer(file: str) -> bool:
    return any(Path(file).match(pattern) for pattern in TOKENIZER_FILES)


def _add_tokenizer(client: MlflowClient, run_id: str, checkpoint: Path, files: Mapping[str, str]) -> None:
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".tokenizer-") as scratch:  # links where it can
        for file in files:
            link_or_copy(checkpoint / file, Path(scratch, file))
        _add_files(client, run_id, TOKENIZER, Path(scratch))


def _add_files(client: MlflowClient, run_id: str, place: str, folder: Path) -> None:
    """Puts the files of `folder` into the model's folder as `place`: by links in a local store, else by uploading."""
    store = local_path(client.get_run(run_id).info.artifact_uri)
    if store is None:
        with _patient():
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
def _patient() -> Iterator[None]:
    """Gives MLflow's server time to store a large file before it answers."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = str(max(_UPLOAD_S, int(before or 0)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
