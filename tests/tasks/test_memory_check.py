import json
import re

import pytest
import yaml

from lilliput.data.conversations import Conversation
from lilliput.data.row_file import write_lines
from lilliput.data.rows import normalised_line
from lilliput.errors import ConfigError
from lilliput.machine import Machine
from tasks.process import accelerate, memory_check

GIB = 2**30
LARGE = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_params):
    """A folder in which `base` has eight billion parameters, on a machine with 24 GiB."""
    monkeypatch.setattr(memory_check, "this_machine", lambda *shared: Machine(24 * GIB, 0, *shared))
    monkeypatch.delenv(accelerate.SETTING, raising=False)
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "models/base/config.json").write_text(json.dumps(LARGE))
    return tmp_path


def test_candidates_that_do_not_fit_are_listed_with_expected_and_available_memory(project, tiny_params, monkeypatch):
    with pytest.raises(ConfigError) as refused:
        memory_check.require_memory(tiny_params, tiny_params.candidates, project)
    named = re.findall(
        r"^candidates\.(\w+): would take about (\d+\.\d) GiB of memory, of which there are 24\.0",
        str(refused.value),
        re.M,
    )
    assert [name for name, _ in named] == ["base", "distilled"]  # in float32; frozen weights stay in their files
    assert all(float(needed) > 24 for _, needed in named)
    assert "--ignore-memory" in str(refused.value)
    monkeypatch.setenv(memory_check.IGNORE, "1")
    memory_check.require_memory(tiny_params, tiny_params.candidates, project)


def test_candidates_that_fit_or_have_an_unknown_shape_are_accepted(project, tiny_params, monkeypatch):
    memory_check.require_memory(tiny_params, ["lora", "pruned", "pocket"], project)
    memory_check.require_memory(tiny_params, tiny_params.candidates, project / "elsewhere")
    monkeypatch.setattr(memory_check, "this_machine", lambda *shared: Machine(512 * GIB, 0, *shared))
    memory_check.require_memory(tiny_params, tiny_params.candidates, project)


def test_only_a_source_of_another_format_is_opened_in_float32(project, tiny_params):
    def expected(**source):
        params = tiny_params.model_copy(update={"source": tiny_params.source.model_copy(update=source)})
        return memory_check.estimates(params, ["base"], project)["base"].host_bytes

    as_stored = expected(file=None)
    assert as_stored < 4 * GIB < 40 * GIB < expected(file="model.gguf") == expected(file=None, chat_template="chatml")
    (project / "models/source").mkdir()
    (project / "models/source/config.json").write_text(json.dumps(LARGE | {"quantization_config": {"bits": 4}}))
    assert expected(file=None) > 40 * GIB


def test_the_shape_is_that_of_the_nearest_existing_ancestor(project, tiny_params):
    assert memory_check.shape_of(tiny_params, "distilled", project).layers == 32
    (project / "models/pruned").mkdir()
    (project / "models/pruned/config.json").write_text(json.dumps(LARGE | {"num_hidden_layers": 16}))
    assert memory_check.shape_of(tiny_params, "distilled", project).layers == 16


def test_the_longest_conversation_counts_with_its_functions_up_to_the_limit_of_a_row(project, tiny_params):
    def expected(text, **more):
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
        row = Conversation.model_validate({"id": "1", "group": "g", "messages": turns, **more})
        write_lines(project / "data/train.jsonl", [normalised_line(row)])
        return memory_check.estimates(tiny_params, ["lora"], project)["lora"].process_bytes

    (project / "data").mkdir()
    parameters = {"type": "object", "properties": {f"parameter{n}": {"type": "string"} for n in range(99)}}
    plain, long = expected("Hi"), expected("Hi " * 500)
    with_tools = expected("Hi", tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    assert plain < long
    assert plain < with_tools
    limit = tiny_params.data.longest_row_tokens
    assert expected("x" * 3 * limit) == expected("x" * 30 * limit)


def accelerate_file(folder, **settings):
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU", "num_processes": 4, "use_cpu": False} | settings))
    return str(path)


def test_several_processes_are_started_only_for_trainings(tmp_path, tiny_params, monkeypatch):
    monkeypatch.delenv(accelerate.SETTING, raising=False)
    assert accelerate.launch_command(tiny_params, "lora") is None
    monkeypatch.setenv(accelerate.SETTING, accelerate_file(tmp_path))
    assert accelerate.launch_command(tiny_params, "pruned") is None
    command = accelerate.launch_command(tiny_params, "lora")
    assert command[-3:] == ["--module", "tasks.compress", "lora"]
    assert "--multi_gpu" not in command
    monkeypatch.setenv(accelerate.SETTING, accelerate_file(tmp_path, distributed_type="MULTI_CPU"))
    assert "--multi_gpu" in accelerate.launch_command(tiny_params, "distilled")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert accelerate.launch_command(tiny_params, "lora") is None  # already one of the processes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_processes": 3}, "batch_size 4 cannot be divided evenly among the 3 processes"),
        ({"distributed_type": "DEEPSPEED"}, "not a file of `accelerate config`"),
        ({"num_processes": "many"}, "not a file of `accelerate config`"),
    ],
)
def test_invalid_accelerate_settings_are_rejected(tmp_path, tiny_params, monkeypatch, settings, message):
    monkeypatch.setenv(accelerate.SETTING, accelerate_file(tmp_path, **settings))
    with pytest.raises(ConfigError, match=re.escape(message)):
        accelerate.launch_command(tiny_params, "lora")


def test_a_missing_accelerate_file_is_rejected(tmp_path, tiny_params, monkeypatch):
    monkeypatch.setenv(accelerate.SETTING, str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="unset it to train in one process"):
        accelerate.launch_command(tiny_params, "lora")


def test_functions_that_all_rows_share_count_once_and_not_in_every_row(tmp_path):
    def conversation(number, functions):
        tools = [
            {"type": "function", "function": {"name": name, "description": "d" * 3000, "parameters": {}}}
            for name in functions
        ]
        messages = [{"role": "user", "content": "q" * 30}, {"role": "assistant", "content": "a" * 9}]
        raw = {"id": f"{number}", "group": f"{number}", "messages": messages, "tools": tools}
        return normalised_line(Conversation.model_validate(raw))

    (tmp_path / "data").mkdir()

    def tokens(*lists):
        lines = (conversation(number, functions) for number, functions in enumerate(lists))
        write_lines(tmp_path / "data/train.jsonl", lines)
        return memory_check.example_tokens(tmp_path, 4096)

    shared = tokens("ab", "ab")
    assert (shared.rest, shared.answer) == (13, 4)
    assert (shared.mean_rest, shared.mean_answer) == (13, 4)
    assert 2000 < shared.shared < 2150
    one_more = tokens("ab", "abc", "abd")
    assert one_more.shared == shared.shared
    assert 1000 < one_more.rest < 1080
    assert tokens("ab", "ba").rest > 2000  # in another order nothing is shared
