import pytest
from transformers import LlamaConfig

from lilliput.config import Params
from lilliput.errors import ConfigError
from lilliput.graph import ancestors, check_graph, check_shape, needing_hardware, require_hardware, topological_order

BASE = {"from": "source", "apply": "load"}
SHAPE = LlamaConfig(  # 9 query heads of 64 channels over 3 key-value heads
    num_hidden_layers=4,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=1000,
    dtype="bfloat16",
)


def prune(parent, method, by, value, multiple=32):
    return {
        "from": parent,
        "apply": "prune",
        "with": {"method": method, "amount": {"by": by, "value": value}, "multiple": multiple},
    }


@pytest.fixture
def with_candidates(tiny_params):
    def make(candidates) -> Params:
        raw = tiny_params.model_dump(mode="json", by_alias=True) | {"candidates": candidates}
        raw["caching"]["candidates"] = []
        raw["compile"] = raw["serving"] = {}
        return Params.model_validate_json(__import__("json").dumps(raw))

    return make


def problems(params) -> str:
    with pytest.raises(ConfigError) as caught:
        check_graph(params, "params.yaml")
    return str(caught.value)


def test_order_puts_parents_first_and_keeps_the_file_order_otherwise(with_candidates):
    params = with_candidates(
        {
            "z": {"from": "a", "apply": "lora"},
            "a": BASE,
            "b": {"from": "z", "apply": "prune"},
            "q": {"from": "a", "apply": "gptq"},
        }
    )
    assert topological_order(params) == ["a", "z", "q", "b"]
    assert ancestors(params, "b") == ["z", "a"]


def test_unknown_parent_is_named_with_a_suggestion(with_candidates):
    message = problems(with_candidates({"base": BASE, "lora": {"from": "bass", "apply": "lora"}}))
    assert message == "params.yaml: candidates.lora.from: unknown parent `bass`; did you mean `base`?"


def test_cycle_is_shown_whole(with_candidates):
    message = problems(with_candidates({"a": {"from": "b", "apply": "lora"}, "b": {"from": "a", "apply": "prune"}}))
    assert "circle" in message
    assert "a → b → a" in message or "b → a → b" in message


def test_only_load_follows_the_source(with_candidates):
    assert "`load` and only `load`" in problems(with_candidates({"lora": {"from": "source", "apply": "lora"}}))
    assert "`load` and only `load`" in problems(
        with_candidates({"base": BASE, "again": {"from": "base", "apply": "load"}})
    )


@pytest.mark.parametrize("teacher", [None, "other", "nobody"])
def test_teacher_must_be_an_ancestor(with_candidates, teacher):
    graph = {"base": BASE, "other": {"from": "base", "apply": "lora"}, "pruned": {"from": "base", "apply": "prune"}}
    graph["student"] = {"from": "pruned", "apply": "distill"} | ({"teacher": teacher} if teacher else {})
    assert "candidates.student.teacher" in problems(with_candidates(graph))


def test_teacher_elsewhere_than_distillation_is_refused(with_candidates):
    assert "only `distill`" in problems(
        with_candidates({"base": BASE, "l": {"from": "base", "apply": "lora", "teacher": "base"}})
    )


@pytest.mark.parametrize("quantiser", ["gptq", "rtn", "awq"])
@pytest.mark.parametrize("strategy", ["lora", "prune", "gptq", "rtn", "awq"])
@pytest.mark.parametrize("trained", [False, True])
def test_only_distillation_follows_a_quantised_candidate(with_candidates, strategy, quantiser, trained):
    graph = {"base": BASE, "q": {"from": "base", "apply": quantiser}}
    if trained:
        graph["t"] = {"from": "q", "apply": "distill", "teacher": "base"}
        check_graph(with_candidates(graph), "params.yaml")
    parent = "t" if trained else "q"
    message = problems(with_candidates(graph | {"child": {"from": parent, "apply": strategy}}))
    assert f"needs a float parent, but `{parent}` is quantised by {quantiser}" in message
    assert f"apply {strategy} first and quantise last (from: base)" in message


def test_a_quantised_teacher_of_a_quantised_student_is_refused(with_candidates):
    graph = {"base": BASE, "q": {"from": "base", "apply": "rtn"}}
    message = problems(with_candidates(graph | {"t": {"from": "q", "apply": "distill", "teacher": "q"}}))
    assert "candidates.t.teacher: `q` is quantised" in message
    assert "for example `base`" in message


def test_mixed_groups_of_a_student_are_refused(with_candidates):
    graph = {"base": BASE, "q": {"from": "base", "apply": "gptq", "with": {"act_order": True}}}
    message = problems(with_candidates(graph | {"t": {"from": "q", "apply": "distill", "teacher": "base"}}))
    assert "cannot train the codes of `q`, whose groups are mixed; set act_order: false there" in message


@pytest.mark.parametrize("strategy", ["lora", "prune", "gptq"])
def test_nothing_follows_a_sparse_candidate(with_candidates, strategy):
    graph = {"base": BASE, "s": {"from": "base", "apply": "sparsify"}, "child": {"from": "s", "apply": strategy}}
    assert "would not keep the zeros of `s`" in problems(with_candidates(graph))


def test_an_adapter_kept_apart_has_no_descendants(with_candidates):
    graph = {
        "base": BASE,
        "l": {"from": "base", "apply": "lora", "with": {"merge": False}},
        "p": {"from": "l", "apply": "prune"},
    }
    assert "set merge: true" in problems(with_candidates(graph))


def test_several_problems_come_together(with_candidates):
    graph = {
        "base": BASE,
        "q": {"from": "base", "apply": "gptq", "with": {"bitz": 1}},
        "l": {"from": "q", "apply": "lora"},
    }
    message = problems(with_candidates(graph))
    assert "float parent" in message
    assert "bitz" in message


def shape_problems(params) -> str:
    with pytest.raises(ConfigError) as caught:
        check_shape(params, "base", SHAPE)
    return str(caught.value)


@pytest.mark.parametrize("quantiser", ["gptq", "rtn", "awq"])
def test_shape_is_checked_for_all_descendants(with_candidates, quantiser):
    good = {"base": BASE, "p": {"from": "base", "apply": "prune"}, "q": {"from": "p", "apply": quantiser}}
    check_shape(with_candidates(good), "base", SHAPE)
    bad = {"base": BASE, "p": prune("base", "perplexity", "removed_count", 4)}
    bad["q"] = {"from": "base", "apply": quantiser, "with": {"group_size": 128}}
    message = shape_problems(with_candidates(bad))
    assert "candidates.p: strategies.prune.amount: removed_count 4 leaves 0 of 4 layers" in message
    assert "group_size 128 does not divide the layers' input sizes 576, 1536; choose 64, 32, 16" in message


def test_layers_removed_twice_are_added_up(with_candidates):
    two = prune("base", "block_influence", "removed_count", 2)
    message = shape_problems(with_candidates({"base": BASE, "p": two, "pp": {**two, "from": "p"}}))
    assert message.startswith("candidates.pp: strategies.prune.amount: removed_count 2 leaves 0 of 2 layers")


def test_group_size_has_to_divide_the_widths_that_pruning_will_leave(with_candidates):
    def graph(multiple, value):
        narrow = prune("base", "neurons", "removed_count", value, multiple)
        return with_candidates({"base": BASE, "p": narrow, "q": {"from": "p", "apply": "gptq"}})

    check_shape(graph(32, 384), "base", SHAPE)
    message = shape_problems(graph(8, 8))
    assert (
        "candidates.q: group_size 32 does not divide the layers' input sizes 576, 1528; no supported group size"
        in message
    )


def test_channels_that_heads_cannot_share_are_refused_but_not_after_a_head_went(with_candidates):
    straight = with_candidates({"base": BASE, "h": prune("base", "hidden", "removed_count", 96)})
    assert "leaves 480 of 576 hidden channels; choose `value: 288` (leaves 288)" in shape_problems(straight)
    heads = prune("base", "kv_groups", "removed_count", 1)
    graph = {"base": BASE, "g": heads, "h": prune("g", "hidden", "removed_count", 96)}
    check_shape(with_candidates(graph | {"q": {"from": "h", "apply": "gptq"}}), "base", SHAPE)


def test_the_pattern_needs_the_widths_that_pruning_will_leave_in_fours(with_candidates):
    graph = {"base": BASE, "p": prune("base", "neurons", "removed_count", 2, 2)}
    graph["s"] = {"from": "p", "apply": "sparsify", "with": {"pattern": "2:4"}}
    assert "candidates.s: pattern 2:4 needs inputs in fours, but layers have 576, 1534" in shape_problems(
        with_candidates(graph)
    )


def test_caching_needs_known_candidates_and_takes_a_question_file(with_candidates):
    params = with_candidates({"base": BASE})
    caching = params.caching.model_copy(update={"candidates": ("base", "pockt")})
    data = params.data.model_copy(update={"source": "mine.jsonl"})
    message = problems(params.model_copy(update={"caching": caching, "data": data}))
    assert "caching.candidates: unknown candidate `pockt`; name one of: base" in message
    assert "mine.jsonl" not in message


@pytest.fixture
def wanting_gpu(with_candidates):
    graph = {"base": BASE, "l": {"from": "base", "apply": "lora"}}
    graph["q"] = {"from": "base", "apply": "lora", "with": {"variant": "qlora"}}
    graph["b"] = {"from": "base", "apply": "lora", "with": {"precision": "bfloat16"}}
    return with_candidates(graph)


def processor(monkeypatch, *, bfloat16):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("lilliput.hardware._processor_multiplies_bfloat16", lambda: bfloat16)


def test_candidates_that_the_machine_cannot_make_are_rejected(wanting_gpu, monkeypatch):
    assert needing_hardware(wanting_gpu) == {"q": "variant: qlora", "b": "precision: bfloat16"}
    processor(monkeypatch, bfloat16=False)
    require_hardware(wanting_gpu, ["base", "l"])
    with pytest.raises(ConfigError) as caught:
        require_hardware(wanting_gpu, ["base", "l", "q", "b"])
    message = str(caught.value)
    assert "candidates.q: `variant: qlora` needs an NVIDIA GPU, and torch finds none" in message
    assert "candidates.b: `precision: bfloat16` needs an NVIDIA GPU or a processor that multiplies" in message


def test_a_processor_with_bfloat16_replaces_a_gpu(wanting_gpu, monkeypatch):
    processor(monkeypatch, bfloat16=True)
    require_hardware(wanting_gpu, ["b"])
    with pytest.raises(ConfigError, match=r"candidates\.q"):
        require_hardware(wanting_gpu, ["q"])


def test_qlora_without_bitsandbytes_is_refused_by_name(wanting_gpu, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lilliput\[gpu\]'"):
        require_hardware(wanting_gpu, ["q"])
    with pytest.raises(ConfigError, match=r"candidates\.b"):  # a GPU that only emulates bfloat16
        require_hardware(wanting_gpu, ["b"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    require_hardware(wanting_gpu, ["q"])


@pytest.mark.parametrize(
    ("mixture", "child"),
    [
        ("moe", {"apply": "gptq"}),
        ("moe", {"apply": "moe"}),
        ("moe", {"apply": "experts"}),
        ("moe", {"apply": "prune", "with": {"method": "neurons"}}),
        ("moe", {"apply": "sparsify"}),
        ("experts", {"apply": "moe"}),
        ("experts", {"apply": "lora"}),
        ("experts", {"apply": "awq"}),
    ],
)
def test_strategies_that_do_not_handle_experts_cannot_follow_a_mixture(with_candidates, mixture, child):
    graph = {"base": BASE, "m": {"from": "base", "apply": mixture}}
    graph |= {"d": {"from": "m", "apply": "distill", "teacher": "base"}, "child": {"from": "d"} | child}
    message = problems(with_candidates(graph))
    told = f"`{child['apply']}` with these settings does not reach the experts of `m`, which {mixture} made"
    assert told in message
    assert "(from: base)" in message


def test_training_and_depth_pruning_may_follow_a_mixture(with_candidates):
    graph = {"base": BASE, "m": {"from": "base", "apply": "moe"}, "l": {"from": "m", "apply": "lora"}}
    graph |= {"d": {"from": "l", "apply": "distill", "teacher": "base"}, "p": {"from": "d", "apply": "prune"}}
    graph |= {"e": {"from": "base", "apply": "experts"}, "f": {"from": "e", "apply": "prune"}}
    graph["g"] = {"from": "f", "apply": "distill", "teacher": "base"}
    check_graph(with_candidates(graph), "params.yaml")


def test_experts_must_divide_the_neurons_that_pruning_will_leave(with_candidates):
    mixture = {"from": "base", "apply": "moe", "with": {"experts": 5}}
    message = shape_problems(with_candidates({"base": BASE, "m": mixture}))
    assert (
        "candidates.m: 5 experts and 2 shared ones do not divide the 1536 neurons of a layer; choose `experts: 4`"
        in message
    )
    narrow = prune("base", "neurons", "removed_count", 136, 8)
    check_shape(with_candidates({"base": BASE, "p": narrow, "m": {**mixture, "from": "p"}}), "base", SHAPE)


@pytest.fixture
def with_compile(tiny_params):
    def make(compiled, **changes) -> Params:
        raw = tiny_params.model_dump(mode="json", by_alias=True) | {"compile": compiled, "serving": {}}
        for name, settings in changes.items():
            raw["candidates"][name]["with"] = settings
        return Params.model_validate_json(__import__("json").dumps(raw))

    return make


@pytest.mark.parametrize(
    ("name", "spec", "settings", "problem"),
    [
        ("ghost-gguf", {"candidate": "ghost", "target": "gguf"}, {}, "unknown candidate `ghost`"),
        ("phone", {"candidate": "pocket", "target": "gguf"}, {}, "call it `pocket-gguf`"),
        ("pocket-gguf", {"candidate": "pocket", "target": "gguf"}, {"group_size": 16}, "GGUF's blocks of 32"),
        ("pocket-gguf", {"candidate": "pocket", "target": "gguf"}, {"bits": 8, "symmetric": False}, "symmetric: true"),
        ("pocket-gguf", {"candidate": "pocket", "target": "gguf"}, {"act_order": True}, "act_order: true"),
        ("pocket-onnx", {"candidate": "pocket", "target": "onnx"}, {"bits": 3}, "takes 4 or 8 bits"),
        ("lora-autogptq", {"candidate": "lora", "target": "autogptq"}, {}, "only a quantised candidate"),
    ],
)
def test_targets_that_cannot_hold_their_candidate_are_refused_early(with_compile, name, spec, settings, problem):
    params = with_compile({name: spec}, **({"pocket": settings} if settings else {}))
    told = problems(params)
    assert f"compile.{name}: " in told
    assert problem in told


def test_supported_targets_are_accepted(with_compile):
    for settings in ({"bits": 8}, {"bits": 2, "symmetric": False}, {"group_size": 64}):
        check_graph(with_compile({"pocket-gguf": {"candidate": "pocket", "target": "gguf"}}, pocket=settings), "file")


def test_ggml_is_the_last_strategy_and_takes_no_mixture(with_candidates):
    graph = {"base": BASE, "g": {"from": "base", "apply": "ggml", "with": {"type": "IQ4_NL"}}}
    check_graph(with_candidates(graph), "params.yaml")
    message = problems(with_candidates(graph | {"l": {"from": "g", "apply": "lora"}}))
    assert "`lora` needs a float parent, but `g` is quantised by ggml" in message
    student = {"from": "g", "apply": "distill", "teacher": "base"}
    message = problems(with_candidates(graph | {"t": student}))
    assert "`distill` cannot train the blocks of `g`; apply distill first and ggml last (from: base)" in message
    carved = {"base": BASE, "m": {"from": "base", "apply": "moe"}, "g": {"from": "m", "apply": "ggml"}}
    assert "`ggml` with these settings does not reach the experts of `m`" in problems(with_candidates(carved))


def test_the_type_of_a_file_is_checked_against_the_shape(with_candidates):
    graph = {"base": BASE, "g": {"from": "base", "apply": "ggml", "with": {"type": "Q4_K_M"}}}
    message = shape_problems(with_candidates(graph))
    assert "candidates.g: type Q4_K_M needs rows of a multiple of 256 weights, but layers have 576 inputs" in message
    assert "choose one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, or set other_widths: fallback" in message
    graph["g"]["with"]["other_widths"] = "fallback"
    check_shape(with_candidates(graph), "base", SHAPE)


@pytest.mark.parametrize("target", ["gguf", "onnx", "autogptq"])
def test_only_gguf_holds_the_types_of_ggml(tiny_params, target):
    raw = tiny_params.model_dump(mode="json", by_alias=True)
    raw["candidates"]["pocket"] = {"from": "distilled", "apply": "ggml"}
    raw |= {"compile": {f"pocket-{target}": {"candidate": "pocket", "target": target}}, "serving": {}}
    params = Params.model_validate_json(__import__("json").dumps(raw))
    if target == "gguf":
        check_graph(params, "file")
    else:
        assert "only GGUF holds the types that ggml writes; set target: gguf" in problems(params)
