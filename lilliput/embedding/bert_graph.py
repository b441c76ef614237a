"""An ONNX graph of a BERT encoder, from the settings and weights of its checkpoint.

The graph consists of ONNX Runtime's fused operators (domain com.microsoft). Exporting the PyTorch model instead takes
seconds and torch, and needs passes that find these operators again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from pydantic import BaseModel, Field

_FUSED = "com.microsoft"
_OPSETS, _IR_VERSION = {"": 17, _FUSED: 1}, 8
INPUTS, OUTPUT = ("input_ids", "token_type_ids", "attention_mask"), "last_hidden_state"
_EMBEDDINGS = "embeddings."


class BertSettings(BaseModel):
    """The fields of a BERT checkpoint's `config.json` that its hidden states depend on.

    Values other than these would need another graph. The defaults are those of transformers.
    """

    model_type: Literal["bert"]
    hidden_size: Annotated[int, Field(gt=0)]
    num_hidden_layers: Annotated[int, Field(gt=0)]
    num_attention_heads: Annotated[int, Field(gt=0)]
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: float = 1e-12
    position_embedding_type: Literal["absolute"] | None = "absolute"
    is_decoder: Literal[False] = False


class BertGraph:
    """A BERT encoder that returns its last hidden states.

    Inputs are `INPUTS`, int32 of shape (texts, tokens), padded at the end. The output is `OUTPUT`, float32 of shape
    (texts, tokens, hidden size); the states of padding are undefined.

    Attributes:
        weights: float32, by the names that the graph refers to.

    Args:
        settings: of the checkpoint.
        checkpoint: its tensors, named as in transformers' `BertModel`.

    Raises:
        KeyError: a tensor is missing.
    """

    def __init__(self, settings: BertSettings, checkpoint: Mapping[str, np.ndarray]) -> None:
        self.weights: dict[str, np.ndarray] = {}
        self._settings, self._checkpoint = settings, checkpoint
        self._nodes: list[NodeProto] = []
        states = self._embeddings()
        for number in range(settings.num_hidden_layers):
            states = self._layer(f"encoder.layer.{number}.", states)
        self._nodes[-1].output[0] = OUTPUT

    def model(self) -> ModelProto:
        """The model, without the values of `weights`: the session gets them from memory."""
        inputs = [_value(name, TensorProto.INT32, ["texts", "tokens"]) for name in INPUTS]
        output = _value(OUTPUT, TensorProto.FLOAT, ["texts", "tokens", self._settings.hidden_size])
        declared = [_declare(name, array) for name, array in self.weights.items()]
        graph: GraphProto = helper.make_graph(self._nodes, "bert", inputs, [output], declared)
        opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)

    def _embeddings(self) -> str:
        """The sum of the three embeddings, normalized; and the number of tokens of each text, for attention."""
        tables = [f"{_EMBEDDINGS}{name}_embeddings.weight" for name in ("word", "position", "token_type")]
        inputs = [*INPUTS[:2], *map(self._keep, tables), *self._norm(f"{_EMBEDDINGS}LayerNorm"), INPUTS[2]]
        outputs = ["embedded", "lengths"]
        self._add("EmbedLayerNormalization", inputs, outputs, epsilon=self._settings.layer_norm_eps)
        return outputs[0]

    def _layer(self, prefix: str, states: str) -> str:
        """Attention, then the feed-forward network, each added to its input and normalized."""
        attended = self._attention(f"{prefix}attention.self.", states)
        states = self._add_and_normalize(f"{prefix}attention.output.", attended, states)
        inner = f"{prefix}intermediate.dense"
        product = self._multiply(inner, states)
        activated = self._add("BiasGelu", [product, self._keep(f"{inner}.bias")], [f"{inner}.gelu"])
        return self._add_and_normalize(f"{prefix}output.", activated, states)

    def _attention(self, prefix: str, states: str) -> str:
        """All heads, with the projections for queries, keys and values as one matrix."""
        names = [f"{prefix}{part}" for part in ("query", "key", "value")]
        weight = np.concatenate([self._checkpoint[f"{name}.weight"].T for name in names], axis=1)
        bias = np.concatenate([self._checkpoint[f"{name}.bias"] for name in names])
        inputs = [states, self._set(f"{prefix}weight", weight), self._set(f"{prefix}bias", bias), "lengths"]
        return self._add("Attention", inputs, [f"{prefix}out"], num_heads=self._settings.num_attention_heads)

    def _add_and_normalize(self, prefix: str, states: str, skipped: str) -> str:
        product = self._multiply(f"{prefix}dense", states)
        inputs = [product, skipped, *self._norm(f"{prefix}LayerNorm"), self._keep(f"{prefix}dense.bias")]
        epsilon = self._settings.layer_norm_eps
        return self._add("SkipLayerNormalization", inputs, [f"{prefix}out"], epsilon=epsilon)

    def _multiply(self, name: str, states: str) -> str:
        weight = self._set(f"{name}.weight", self._checkpoint[f"{name}.weight"].T)
        return self._add("MatMul", [states, weight], [f"{name}.product"], domain="")

    def _norm(self, name: str) -> list[str]:
        return [self._keep(f"{name}.weight"), self._keep(f"{name}.bias")]

    def _keep(self, name: str) -> str:
        return self._set(name, self._checkpoint[name])

    def _set(self, name: str, array: np.ndarray) -> str:
        self.weights[name] = np.ascontiguousarray(array, dtype=np.float32)
        return name

    def _add(
        self, operator: str, inputs: list[str], outputs: list[str], domain: str = _FUSED, **attributes: Any
    ) -> str:
        self._nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attributes))
        return outputs[0]


def _value(name: str, kind: int, shape: list[str | int]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _declare(name: str, array: np.ndarray) -> TensorProto:
    """Declares a weight as stored elsewhere; the location is never read."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "memory", "offset": "0", "length": str(array.nbytes)}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor
