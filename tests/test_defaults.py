"""Every section of params.yaml has defaults: a short file means the same as the complete one."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from lilliput.config import DEVICES, RECIPES, Params, Section
from lilliput.errors import ConfigError
from lilliput.params import complete_settings, load_params

PROJECT = Path(__file__).resolve().parent.parent
SHIPPED = PROJECT / "params.yaml"
# Defaults of keys that a complete file leaves out. DVC would not notice a change of one: give a new key instead.
RARE = {
    "SourceConfig": {
        "file": None,
        "sha256": None,
        "parts": (),
        "file_sha256": None,
        "licence": None,
        "licence_files": (),
        "chat_template": None,
    },
    "DataConfig": {"train_on": "all_turns", "longest_row_tokens": 2048},
    "SynthesiseConfig": {
        "system_prompt": "",
        "max_new_tokens": 256,
        "temperature": 0.0,
        "seed": 0,
        "parallel": 4,
        "timeout_s": 120.0,
    },
    "GptqConfig": {"scale_search": 0.0},
    "CandidateConfig": {"teacher": None, "with_": {}},
    "EvaluationConfig": {"benchmarks": ()},
    "BenchmarkConfig": {"file": None, "sha256": None, "limit": None},
    "GgufTarget": {"floats": "f16", "embeddings": "q8_0"},
    "OnnxTarget": {"embeddings": "int8", "deadline_s": 600.0},
    "DeviceConfig": {"target": None, "threads": 1},
    "PromotionConfig": {"max_energy_rise": None, "max_accessibility_drop": None, "approval": False},
    "EdgeConfig": {"candidate": None, "threads": 1, "slots": 1, "url": None, "model": None, "timeout_s": 10.0},
}


def yaml_of(path: Path):
    return YAML(typ="safe").load(path.read_text())


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "short.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_params(path)
    return str(caught.value)


def sections(kind: type[Section] = Section) -> list[type[Section]]:
    return [found for child in kind.__subclasses__() for found in (child, *sections(child))]


def test_an_empty_file_means_the_shipped_one(written):
    assert complete_settings(written("{}\n")) == yaml_of(SHIPPED)
    assert load_params(written("{}\n")) == load_params(SHIPPED)


@pytest.mark.parametrize("path", [SHIPPED, *sorted((PROJECT / "examples").glob("[!s]*.yaml"))], ids=lambda p: p.name)
def test_the_shipped_files_are_complete(path):
    assert complete_settings(path) is None


def test_defaults_that_dvc_does_not_see_stay_as_they_are():
    rare = {
        kind.__name__: {name: kind.model_fields[name].get_default(call_default_factory=True) for name in kind.rare}
        for kind in sections()
        if "rare" in vars(kind)
    }
    assert rare == RARE


def test_a_value_of_a_short_file_is_kept_and_the_rest_is_added(written):
    complete = complete_settings(written("strategies: {lora: {steps: 7}}\ndata: {source: mine.jsonl}\n"))
    shipped = yaml_of(SHIPPED)
    assert complete["strategies"] == shipped["strategies"] | {"lora": shipped["strategies"]["lora"] | {"steps": 7}}
    assert complete["data"] == shipped["data"] | {"source": "mine.jsonl"}


def test_six_lines_are_a_project(written):
    path = written(
        "source:\n  model: path:/models/mine\ndata:\n  source: questions.jsonl\nrecipe: pocket\ndevice: phone-12gb\n"
    )
    params = load_params(path)
    assert list(params.candidates) == ["base", "lora", "pruned", "distilled", "pocket"]
    assert list(params.devices) == ["phone-12gb", "laptop"]  # the laptop's watts are the evaluating machine's
    assert list(params.promotion) == ["phone-12gb"] == list(params.serving)
    assert list(params.compile) == ["lora-gguf", "pocket-gguf"]
    complete = complete_settings(path)
    assert not {"recipe", "device"} & complete.keys()
    assert complete["source"] == {"model": "path:/models/mine"}  # nothing of the built-in model


def test_a_recipe_is_a_part_of_the_shipped_graph(written):
    shipped = load_params(SHIPPED).candidates
    for name in ("pocket", "compared"):
        assert load_params(written(f"recipe: {name}\n")).candidates.items() <= shipped.items()
    assert load_params(written("recipe: compared\n")).candidates == shipped


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_recipe_is_valid_for_every_device(written, recipe, device):
    params = load_params(written(f"recipe: {recipe}\ndevice: {device}\n"))
    assert list(params.promotion) == [device]
    assert list(params.serving) == ([device] if params.devices[device].target == "gguf" else [])


def test_candidates_of_your_own_are_compiled_at_the_ends_of_their_chains(written):
    path = written(
        "candidates:\n"
        "  base: {from: source, apply: load}\n"
        "  small: {from: base, apply: rtn}\n"
        "  wide: {from: base, apply: gptq, with: {bits: 8}}\n"  # GGUF has no type for 8 bits with a zero point
        "device: phone-4gb\n"
    )
    assert list(load_params(path).compile) == ["small-gguf"]
    assert complete_settings(path)["compile"] == {"small-gguf": {"candidate": "small", "target": "gguf"}}
    assert not load_params(path).serving  # which of them the edge server has is for the user to say
    assert not load_params(written(path.read_text() + "compile: {}\n")).compile


def test_a_gateway_needs_its_edge_server_and_its_link(written):
    assert not load_params(written("recipe: pocket\ncompile: {}\n")).serving
    assert not load_params(written("recipe: pocket\nlinks: {}\n")).serving


def test_wrong_short_settings_are_refused_with_the_known_ones(written):
    assert "short.yaml: recipe: there is no 'poket'; did you mean `pocket`?" in refusal(written("recipe: poket\n"))
    assert "device: there is no 'fridge'; known: phone-4gb" in refusal(written("device: fridge\n"))
    assert "device: there is no ['laptop']" in refusal(written("device: [laptop]\n"))
    assert "both say which candidates" in refusal(written("recipe: pocket\ncandidates: {}\n"))
    assert "device: there is no 'laptop'; known: mine" in refusal(
        written("device: laptop\ndevices: {mine: {target: gguf}}\n")
    )
    assert "short.yaml: devises: unknown key (did you mean `devices`?)" in refusal(written("devises: {}\n"))
    assert "short.yaml: recipie: unknown key (did you mean `recipe`?)" in refusal(written("recipie: pocket\n"))


@pytest.mark.parametrize("text", ["devices: 3\n", "evaluation: [1]\ndevice: laptop\n", "compile: 1\n", "links: 2\n"])
def test_a_section_that_is_no_map_is_refused_and_no_crash(written, text):
    assert text.partition(":")[0] in refusal(written(text))


def test_every_section_can_be_left_out(written):
    for section in Params.model_fields:
        left_out = {section, "candidates"} if section == "compile" else {section}
        rest = {key: value for key, value in yaml_of(SHIPPED).items() if key not in left_out}
        path = written("")
        with path.open("w") as stream:
            YAML().dump(rest, stream)
        assert load_params(path) == load_params(SHIPPED), section


def test_a_workspace_gets_all_settings_and_a_complete_file_as_it_is(written, tmp_path):
    from flows.engine.workspace import write_complete

    target = tmp_path / "params.yaml"
    write_complete(written("device: board\n"), target)
    assert target.read_text().startswith("# All settings of short.yaml, with their defaults. Edit that file")
    assert yaml_of(target) == complete_settings(written("device: board\n"))
    write_complete(SHIPPED, target)
    assert target.read_bytes() == SHIPPED.read_bytes()


def test_the_folder_of_a_file_is_the_clone_only_if_dvc_finds_every_setting_there(tmp_path):
    from flows.engine.folders import folder_of

    params = tmp_path / "params.yaml"
    params.write_bytes(SHIPPED.read_bytes())
    assert folder_of(params, project=tmp_path) == tmp_path
    assert folder_of(params, "search", project=tmp_path) == tmp_path / "workspaces" / "params.search"
    params.write_text("device: board\n")
    assert folder_of(params, project=tmp_path) == tmp_path / "workspaces" / "params"
    assert folder_of(tmp_path / "mine.yaml", project=tmp_path) == tmp_path / "workspaces" / "mine"
    own = tmp_path / "elsewhere" / "lilliput.yaml"
    own.parent.mkdir()
    own.write_text("device: board\n")
    assert folder_of(own, project=tmp_path) == folder_of(own.with_name("params.yaml"), project=tmp_path) == own.parent
    assert folder_of(own, "search", project=tmp_path) == own.parent / "workspaces" / "lilliput.search"
