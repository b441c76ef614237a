"""Opens, saves and proves causal language models: safetensors only, never pickle, never remote code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lilliput.artifacts import ADAPTER
from lilliput.errors import ArtifactError, LilliputError, SourceError
from lilliput.memory import FLOAT, free_bytes
from lilliput.redaction import environment_without_secrets
from lilliput.resident import give_back_memory
from lilliput.untrusted import require_harmless

PROBE_TEXT = "The capital of France is Paris. Water is made of hydrogen and oxygen; iron is a metal, and so is gold."
Opened = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def device() -> torch.device:
    """The accelerator if there is one, else the CPU; also where FSDP is to share out a model too large for one of them.

    Of several processes each has its own, which accelerate sets.
    """
    return torch.device("cuda" if torch.cuda.is_available() and not sharded() else "cpu")


def sharded() -> bool:
    """Whether each of several processes holds a part of the model alone (FSDP), as accelerate's environment says."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def open_model(directory: Path) -> Opened:
    """The model in `directory`, in float32 and evaluation mode, and its tokenizer; on the GPU if it fits there.

    A GPTQ checkpoint is dequantised: each weight becomes `scale · (code − zero)`, the very number its kernels use. A
    LoRA adapter kept apart is applied.

    Raises:
        ArtifactError: `directory` holds no checkpoint that opens, or something that would run.
    """
    config = read_config(directory)
    with opening(directory, ArtifactError):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        model = _dequantised(directory) if is_quantised(config) else _checkpoint(directory)
        if (directory / ADAPTER).is_dir():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(directory / ADAPTER)).merge_and_unload()
    return model.eval().to(_place_for(model)), tokenizer  # pyright: ignore[reportReturnType, reportArgumentType]


def _place_for(model: torch.nn.Module) -> torch.device:
    """`device`, but the CPU for weights that would leave no tenth of a GPU's free memory to compute in."""
    where, needed = device(), FLOAT * parameter_count(model)
    return where if where.type == "cpu" or needed <= 0.9 * free_bytes(where) else torch.device("cpu")


@contextmanager
def opening(place: Path, refusal: type[LilliputError]) -> Iterator[None]:
    """Raises any exception of a library over the files at `place` as `refusal`, with a remedy that fits its cause.

    The libraries document no list of what they raise.

    Raises:
        refusal: an exception other than a LilliputError was raised in the block; it is the cause.
    """
    try:
        yield
    except LilliputError:
        raise
    except Exception as error:
        raise refusal(
            f"{place}: no model that opens ({type(error).__name__}: {_first_line(error)}); {_remedy(error)}"
        ) from error


def _remedy(error: Exception) -> str:
    """What to do about `error`, which a library raised while it opened a model."""
    text = str(error)
    if isinstance(error, ImportError):
        return "install what it names, or use a model that does not need it"
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return "use a machine with more memory, or a smaller model"
    if "GGUF model with architecture" in text:
        return "use the safetensors release of this model (source.model without source.file)"
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return f"transformers {transformers.__version__} does not know it; choose a model that it knows"
    if "ignore_mismatched_sizes" in text or "size mismatch" in text:
        return "its configuration and its weights have different shapes; fetch both from the same revision"
    return "a file is damaged, missing or incomplete; fetch or make it again"


def open_nf4(directory: Path, bfloat16: bool) -> Opened:
    """The model in `directory` with its linear layers in NF4, the rest in float32, and its tokenizer, to train beside.

    The constants of the blocks are quantised in their turn (Dettmers et al., QLoRA, arXiv 2305.14314, section 3).

    Args:
        directory: a float checkpoint.
        bfloat16: whether the dequantised layers compute in bfloat16, else in float32.

    Raises:
        ImportError: bitsandbytes is not installed; `require_gpu` says so early.
        ArtifactError: something in `directory` would run.
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
    """The configuration of the checkpoint in `directory`.

    Raises:
        ArtifactError: there is none, it is no causal language model's, or something beside it would run.
    """
    require_harmless(directory)
    with opening(directory, ArtifactError):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        require_causal_lm(config, str(directory))
    return config


def require_causal_lm(config: PretrainedConfig, place: str) -> None:
    """Raises SourceError unless `config` names a causal language model."""
    architectures = config.architectures or []
    # A GGUF file names no architecture; then the model type must be one transformers has a causal LM for.
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not (any(name.endswith("ForCausalLM") for name in architectures) or (known and not architectures)):
        raise SourceError(
            f"{place}: not a causal language model (model type `{config.model_type}`, architectures: "
            f"{', '.join(architectures) or 'none named'}); choose a decoder such as Llama, Qwen, Mistral or Gemma"
        )


def is_quantised(config: PretrainedConfig) -> bool:
    """Whether the checkpoint's weights are quantised codes."""
    return getattr(config, "quantization_config", None) is not None


def random_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model of `config`'s shape with seeded random weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype | None = None
) -> None:
    """Writes a checkpoint that plain transformers opens; `model`'s weights are cast to `dtype` in place first.

    Raises:
        ArtifactError: a weight is NaN or infinite, or would be in `dtype`; nothing is written then.
    """
    require_finite(
        model,
        dtype or stored_dtype(model),
        f"{directory}: not written",
        "the step before diverged: lower its learning rate, or raise the damping of its solver",
    )
    for parameter in model.parameters():  # not the buffers: rounded rotary frequencies would change every logit
        parameter.data = parameter.data.to(dtype or stored_dtype(model))
    # Nothing but greedy decoding is used or measured; sampling defaults of the source are kept where it has them.
    model.generation_config = model.generation_config or GenerationConfig.from_model_config(model.config)
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)


def require_finite(model: torch.nn.Module, dtype: torch.dtype, place: str, remedy: str) -> None:
    """Raises ArtifactError if a weight or buffer of `model` is NaN or infinite, or would be when stored as `dtype`.

    Args:
        model: in any float dtype.
        dtype: that the checkpoint is stored in.
        place: of the model, for the message.
        remedy: what to do about NaN and infinite values, for the message.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if broken := int((~torch.isfinite(tensor)).sum()):
            raise ArtifactError(f"{place}: {name}: {broken} of {tensor.numel()} values are NaN or infinite; {remedy}")
        if too_large := int((~torch.isfinite(tensor.to(dtype))).sum()):
            raise ArtifactError(
                f"{place}: {name}: {too_large} of {tensor.numel()} values (largest {tensor.abs().max().item():.4g}) do "
                f"not fit into {str(dtype).removeprefix('torch.')} (at most {torch.finfo(dtype).max:.4g}); store it as "
                "bfloat16 or float32 (strategies.load.dtype)"
            )


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype `model`'s checkpoint was stored in, which its descendants keep."""
    return getattr(model, "stored_dtype", torch.float32)


def parameter_count(model: torch.nn.Module) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder layers of a model of the Llama kind.

    Raises:
        ArtifactError: the model has no `model.layers`.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ArtifactError(
            f"{type(model).__name__} has no list of decoder layers at `model.layers`; "
            "this strategy handles decoders of the Llama kind (Llama, Mistral, Qwen, Gemma, …)"
        )
    return layers


def vocabulary_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits for chosen hidden states of the last layer, as the model's own forward would give them.

    Args:
        model: a causal LM of the Llama kind.
        hidden: float tensor (…, hidden size), after the final norm.

    Returns:
        Tensor (…, vocabulary), scaled (Granite, Cohere) or capped (Gemma 2) where the architecture does so.
    """
    logits = cast("torch.nn.Module", model.get_output_embeddings())(hidden)
    logits = logits / getattr(model.config, "logits_scaling", 1.0) * getattr(model.config, "logit_scale", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


@torch.inference_mode()
def probe_logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Logits of the fixed probe text, float32, shape (tokens, vocabulary)."""
    ids = tokenizer(PROBE_TEXT, return_tensors="pt")["input_ids"]
    where = next(model.parameters()).device
    return model(input_ids=ids.to(where)).logits[0].float().cpu()


def _require_finite_logits(logits: torch.Tensor, directory: Path) -> None:
    if not torch.isfinite(logits).all():
        raise ArtifactError(
            f"{directory}: the model computes logits that are NaN or infinite, though its weights are finite: some are "
            "too large; lower the learning rate of its training, or choose another parent"
        )


def prove_reload(directory: Path, expected_logits: torch.Tensor, tolerance: float) -> float:
    """The largest logit difference between the model in memory and `directory` reopened in a fresh process.

    Args:
        directory: the written checkpoint.
        expected_logits: `probe_logits` of the model in memory, shape (tokens, vocabulary).
        tolerance: largest absolute difference allowed, in logits.

    Raises:
        ArtifactError: the checkpoint does not open by itself, is another model, or computes no finite logits.
    """
    _require_finite_logits(expected_logits, directory)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "reloaded.safetensors")
        command = [sys.executable, "-m", "lilliput.models", str(directory), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment_without_secrets())
        if done.returncode:
            raise ArtifactError(f"{directory}: does not reopen in a fresh process:\n{done.stderr[-2000:]}")
        difference = (load_file(path)["logits"] - expected_logits).abs().max().item()
    if not difference <= tolerance:  # written so that NaN fails too
        raise ArtifactError(
            f"{directory}: reopened in a fresh process its logits differ by {difference:.3g} "
            f"(tolerance {tolerance:.3g}), so what was written is not what was made"
        )
    return difference


def open_safetensors(directory: Path) -> PreTrainedModel:
    """The float checkpoint in `directory`, in float32, every weight of it read from its files.

    Raises:
        ArtifactError: weights are missing, which transformers would draw at random, or the files hold weights that the
            model has no place for, which it would drop.
    """
    opened: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    model, loading = opened
    if missing := sorted(loading["missing_keys"]):
        raise ArtifactError(
            f"{directory}: {len(missing)} weights are missing, {missing[0]} among them; fetch or make it again"
        )
    if unused := sorted(loading["unexpected_keys"]):
        raise ArtifactError(
            f"{directory}: {len(unused)} weights have no place in {type(model).__name__} as config.json describes it, "
            f"{unused[0]} among them; without them it would be another model: correct config.json (layers, biases)"
        )
    return model


def open_dequantised(directory: Path) -> PreTrainedModel:
    """The GPTQ checkpoint in `directory` as a float32 model, whose configuration knows of no quantisation."""
    model = _dequantised(directory)
    vars(model.config).pop("quantization_config", None)
    for trace in ("is_quantized", "hf_quantizer", "quantization_method", "hf_device_map"):
        if hasattr(model, trace):
            delattr(model, trace)
    return model


def _checkpoint(directory: Path) -> PreTrainedModel:
    model = open_safetensors(directory)
    name = json.loads((directory / "config.json").read_text()).get("dtype") or "float32"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"{directory / 'config.json'}: dtype: torch has none of this name; found {name!r:.80}")
    model.stored_dtype = dtype  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        if name.endswith(".mlp.gate.weight"):
            parameter.requires_grad_(False)  # a carved router's logits are thousandths: one step of Adam drowns them
    return model


def _dequantised(directory: Path) -> PreTrainedModel:
    from gptqmodel import BACKEND, GPTQModel

    # The kernel opens in float16 only. Its scales are float16 and so are exact; what is left in float is not.
    packed = GPTQModel.load(
        str(directory), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16, trust_remote_code=False
    ).model
    model = dequantise(cast("PreTrainedModel", packed))
    own = dict(model.named_parameters())
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in own.keys() & set(tensors.keys()):
                own[name].data = tensors.get_tensor(name).float()
    give_back_memory()
    return model


def dequantise(model: PreTrainedModel) -> PreTrainedModel:
    """`model` in float32 with plain linear layers in place of GPTQModel's, changed in place."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    # GPTQModel compiles the formula on its first use, which takes longer than running it on every layer.
    with torch.compiler.set_stance("force_eager"):
        for name in [name for name, module in model.named_modules() if isinstance(module, TorchLinear)]:
            model.set_submodule(name, _dense(model.get_submodule(name)))  # one by one: the packed one is gone then
    for parameter in model.parameters():  # not the buffers, see save_model
        parameter.data = parameter.data.float()
    return model


def _dense(module: Any) -> torch.nn.Linear:
    linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    module.scales.data = module.scales.data.float()
    linear.weight.data = module.dequantize_weight().T.float().contiguous()
    if module.bias is not None:
        linear.bias.data = module.bias.float()
    return linear


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _write_probe(arguments: Iterable[str]) -> Any:
    directory, target = (Path(argument) for argument in arguments)
    save_file({"logits": probe_logits(*open_model(directory))}, target)


if __name__ == "__main__":
    _write_probe(sys.argv[1:])
