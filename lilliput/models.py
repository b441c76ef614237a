"""Opens causal language models: safetensors only, never pickle, never remote code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lilliput.artifacts import ADAPTER
from lilliput.code_layers import hold_codes
from lilliput.codes import PARTS, has_codes, read_codes
from lilliput.decoders import is_quantised, require_causal_lm
from lilliput.errors import ArtifactError, LilliputError
from lilliput.foreign_gptq import open_with_gptqmodel
from lilliput.ggml.blocks import PART as BLOCKS
from lilliput.ggml.blocks import has_blocks, read_blocks
from lilliput.resident import free_bytes
from lilliput.stored_weights import (
    StoredTensor,
    keep_as_stored,
    matrices_created_in,
    matrix_dtype,
    point_to_files,
    stored_tensors,
)
from lilliput.untrusted import require_harmless

Opened = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Opens = Callable[[Path], PreTrainedModel]


def device() -> torch.device:
    """Returns the accelerator if there is one, else the CPU.

    With FSDP it is the CPU, because a model too large for one accelerator is opened before it is sharded. Each of
    several processes has its own accelerator, which accelerate sets.
    """
    return torch.device("cuda" if torch.cuda.is_available() and not sharded() else "cpu")


def sharded() -> bool:
    """Whether each of several processes holds only a shard of the model (FSDP), by accelerate's environment."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def open_model(directory: Path) -> Opened:
    """Opens the model in `directory` and its tokenizer: float32, evaluation mode, on the GPU if it fits there.

    A GPTQ checkpoint is dequantised: each weight becomes `scale · (code − zero)`, exactly the number that its kernels
    use; one in GGUF's types likewise. A LoRA adapter stored separately is merged.

    Raises:
        ArtifactError: `directory` contains no checkpoint that opens, or contains code.
    """
    return _open(directory, _open_float, _open_gptq)


def open_frozen(directory: Path) -> Opened:
    """Opens the model in `directory` like `open_model`, to the same results, but only to compute with it.

    Its matrices stay in the checkpoint's files and dtype (see `stored_weights`), and codes stay codes.

    Raises:
        ArtifactError: `directory` contains no checkpoint that opens, or contains code.
    """
    return _open(directory, _open_stored_float, _open_stored_gptq)


def _open(directory: Path, open_float: Opens, open_quantised: Opens) -> Opened:
    config = read_config(directory)
    with translate_errors(directory, ArtifactError):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        separate = (directory / ADAPTER).is_dir()
        if separate:  # merging changes the weights
            open_float = _open_float
        model = (open_quantised if is_quantised(config) else open_float)(directory)
        if separate:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(directory / ADAPTER)).merge_and_unload()
    return model.eval().to(_device_for(model)), tokenizer  # pyright: ignore[reportReturnType, reportArgumentType]


def _device_for(model: torch.nn.Module) -> torch.device:
    """Returns `device()`, but the CPU if the weights would leave less than a tenth of the GPU's free memory."""
    preferred, needed_bytes = device(), sum(parameter.nbytes for parameter in model.parameters())
    fits = preferred.type == "cpu" or needed_bytes <= 0.9 * free_bytes(preferred)
    return preferred if fits else torch.device("cpu")


@contextmanager
def translate_errors(place: Path, error_class: type[LilliputError]) -> Iterator[None]:
    """Raises any exception of a library that reads `place` as `error_class`, with a remedy for its cause.

    Every exception is caught, because the libraries do not document what they raise.

    Raises:
        error_class: the block raised an exception other than a LilliputError, which becomes the cause.
    """
    try:
        yield
    except LilliputError:
        raise
    except Exception as error:
        raise error_class(
            f"{place}: the model does not open ({type(error).__name__}: {_first_line(error)}); {_remedy(error)}"
        ) from error


def _remedy(error: Exception) -> str:
    """Returns advice for `error`, which a library raised while it opened a model."""
    text = str(error)
    if isinstance(error, ImportError):
        return "install the package it names, or use a model that does not need it"
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return "use a machine with more memory, or a smaller model"
    if "GGUF model with architecture" in text:
        return "use the safetensors release of this model (source.model without source.file)"
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return f"transformers {transformers.__version__} does not support this architecture; choose a supported model"
    if "ignore_mismatched_sizes" in text or "size mismatch" in text:
        return "its configuration and its weights have different shapes; fetch both from the same revision"
    return "a file is damaged, missing or incomplete; download or create it again"


def open_nf4(directory: Path, bfloat16: bool) -> Opened:
    """Opens the model in `directory` with linear layers in NF4 and the rest in float32, for QLoRA, and its tokenizer.

    The quantisation constants are quantised as well (Dettmers et al., QLoRA, arXiv 2305.14314, section 3).

    Args:
        directory: a float checkpoint.
        bfloat16: whether the dequantised layers compute in bfloat16, else in float32.

    Raises:
        ImportError: bitsandbytes is not installed; `require_hardware` checks this early.
        ArtifactError: `directory` contains code.
    """
    require_harmless(directory)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bfloat16 else torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        quantization_config=quantisation,
        device_map={"": device()},
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def read_config(directory: Path) -> PretrainedConfig:
    """Returns the configuration of the checkpoint in `directory`.

    Raises:
        ArtifactError: `directory` has no configuration, or contains code.
        SourceError: the model is not a causal language model.
    """
    require_harmless(directory)
    with translate_errors(directory, ArtifactError):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        require_causal_lm(config, str(directory))
    return config


def random_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Returns a model of `config`'s shape with seeded random weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """Returns the dtype of `model`'s checkpoint, which models derived from it keep."""
    return getattr(model, "stored_dtype", torch.float32)


def open_safetensors(directory: Path) -> PreTrainedModel:
    """Opens the float checkpoint in `directory` in float32; every weight must come from its files.

    Raises:
        ArtifactError: weights are missing, which transformers would initialise randomly, or the files hold weights
            without a place in the model, which transformers would drop.
    """
    opened: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    model, loading = opened
    _require_all_weights(directory, type(model).__name__, loading)
    return model


def _require_all_weights(directory: Path, model_name: str, loading: Mapping[str, Iterable[str]]) -> None:
    """Raises ArtifactError unless `loading`, transformers' information, shows that weights and model match."""
    if missing := sorted(loading["missing_keys"]):
        raise ArtifactError(
            f"{directory}: {len(missing)} weights are missing, for example {missing[0]}; download or create the "
            "checkpoint again"
        )
    if unused := sorted(loading["unexpected_keys"]):
        raise ArtifactError(
            f"{directory}: {len(unused)} weights have no place in {model_name} as config.json describes it, "
            f"for example {unused[0]}; without them it would be a different model: correct config.json (layers, biases)"
        )


def open_dequantised(directory: Path) -> PreTrainedModel:
    """Opens the GPTQ checkpoint in `directory` as a float32 model whose configuration mentions no quantisation."""
    model = _open_gptq(directory)
    vars(model.config).pop("quantization_config", None)
    for attribute in ("is_quantized", "hf_quantizer", "quantization_method", "hf_device_map"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    return model


def _open_float(directory: Path) -> PreTrainedModel:
    return _as_configured(open_safetensors(directory), directory)


def _open_stored_float(directory: Path) -> PreTrainedModel:
    """Opens as stored if derived models will have the dtype of the files; otherwise rounding would differ."""
    if matrix_dtype(stored_tensors(directory)) != _configured_dtype(directory):
        return _open_float(directory)
    return _as_configured(open_safetensors_as_stored(directory), directory)


def open_safetensors_as_stored(directory: Path) -> PreTrainedModel:
    """Opens like `open_safetensors`, but leaves matrices in their files if all of these have the same dtype.

    Raises:
        ArtifactError: as `open_safetensors`.
    """
    stored = stored_tensors(directory)
    with matrices_created_in(matrix_dtype(stored)):
        model = open_safetensors(directory)
    keep_as_stored(model)
    point_to_files(model, stored)
    return model


def _configured_dtype(directory: Path) -> torch.dtype:
    name = json.loads((directory / "config.json").read_text()).get("dtype") or "float32"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"{directory / 'config.json'}: dtype: {name!r:.80} is not a torch dtype; correct it")
    return dtype


def _as_configured(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Notes the dtype that models derived from `model` are stored in, and freezes its routers."""
    model.stored_dtype = _configured_dtype(directory)  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        if name.endswith(".mlp.gate.weight"):
            # A carved router's logits are thousandths: one Adam step would overwrite them.
            parameter.requires_grad_(False)
    return model


def _open_gptq(directory: Path) -> PreTrainedModel:
    if has_blocks(directory):
        return open_blocks(directory)
    return open_codes(directory) if has_codes(directory) else open_with_gptqmodel(directory)


def _open_stored_gptq(directory: Path) -> PreTrainedModel:
    if has_blocks(directory):
        return open_blocks(directory)
    return open_codes_as_stored(directory) if has_codes(directory) else open_with_gptqmodel(directory)


def open_blocks(directory: Path) -> PreTrainedModel:
    """Opens a checkpoint in GGUF's types: each matrix becomes the float32 numbers that its blocks stand for.

    Raises:
        ArtifactError: weights are missing, or have no place in the model.
    """
    weights = {f"{name}.weight": torch.from_numpy(blocks.weight()) for name, blocks in read_blocks(directory)}
    return _open_weights(directory, weights | _float_tensors(directory, {BLOCKS}))


def _float_tensors(directory: Path, parts: Collection[str]) -> dict[str, torch.Tensor]:
    """Returns the tensors in `directory` in float32, except those whose names end with one of `parts`."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = (name for name in sorted(opened.keys()) if name.rpartition(".")[2] not in parts)
            tensors |= {name: opened.get_tensor(name).float() for name in names}
    return tensors


def open_codes(directory: Path) -> PreTrainedModel:
    """Opens a GPTQ checkpoint in AutoGPTQ's format, without GPTQModel, whose import alone takes seconds.

    Raises:
        ArtifactError: weights are missing, or have no place in the model.
    """
    weights = {f"{name}.weight": torch.from_numpy(codes.weight()) for name, codes in read_codes(directory)}
    return _open_weights(directory, weights | _float_tensors(directory, PARTS))


def open_codes_as_stored(directory: Path) -> PreTrainedModel:
    """Opens like `open_codes`, but leaves codes and matrices in their files.

    Raises:
        ArtifactError: as `open_codes`.
    """
    stored = stored_tensors(directory)
    floats = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[2] not in PARTS}
    layers = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    dtype = matrix_dtype(floats)
    places = {f"{name}.weight": torch.zeros((), dtype=dtype).expand(_layer_shape(stored, name)) for name in layers}
    with matrices_created_in(dtype):
        model = _open_weights(directory, places | {name: tensor.read() for name, tensor in floats.items()})
    for name in layers:
        parts = {part: stored[f"{name}.{part}"].as_tensor() for part in PARTS}
        hold_codes(cast("torch.nn.Linear", model.get_submodule(name)), parts)
    keep_as_stored(model)
    point_to_files(model, floats)
    return model


def _layer_shape(stored: Mapping[str, StoredTensor], layer: str) -> tuple[int, int]:
    """Returns the outputs and inputs of a quantised layer."""
    return stored[f"{layer}.scales"].shape[1], stored[f"{layer}.g_idx"].shape[0]


def _open_weights(directory: Path, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Returns the model that `directory` describes as a quantised one, with the float `weights`.

    Raises:
        ArtifactError: weights are missing, or have no place in the model.
    """
    config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    del config.quantization_config
    floats_dtype = config.dtype or torch.float32  # opening replaces it
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # the auto class needs a folder of weights
    model, loading = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
    )
    _require_all_weights(directory, type(model).__name__, loading)
    model.config.name_or_path = str(directory)
    model.stored_dtype = floats_dtype
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
