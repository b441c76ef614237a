"""Every command that documents and messages name exists, with these options; every example of settings is valid."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess

import pytest
import typer
from ruamel.yaml import YAML

from lilliput.data.questions import read_questions
from lilliput.ingestion.intake import inspect
from lilliput.params import load_params
from tests.documents.reading import DOCUMENTS, PROJECT, blocks, inline_commands, name_of

_MODULE = re.compile(r"python -m ((?:flows|tasks|lilliput|benchmarks)[\w.]*)((?: (?:<[^>`\n]*>|[^`\n|&;#()·>])*)?)")
_SOURCES = [path for folder in ("lilliput", "tasks", "flows", "scripts") for path in (PROJECT / folder).rglob("*.py")]


def _documented() -> list[tuple[str, str]]:
    named = [
        (block.place, command)
        for document in DOCUMENTS
        for block in blocks(document, "sh")
        for command in block.commands
    ]
    return named + [found for document in DOCUMENTS for found in inline_commands(document)]


def _in_sources() -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(PROJECT)), re.split("[\"']", match[0])[0])
        for path in _SOURCES
        for match in _MODULE.finditer(path.read_text(encoding="utf-8"))
    ]


def _application(module: str) -> typer.Typer | None:
    """The typer application behind `python -m module`; None for a module that takes no arguments."""
    try:
        found = importlib.import_module(f"{module}.__main__")
    except ModuleNotFoundError:
        found = importlib.import_module(module)
    return getattr(found, "app", None)


def _refusal(module: str, arguments: str) -> str | None:
    """What the command line says against `arguments`; None if it accepts them. Nothing is run."""
    application = _application(module)
    # Placeholders stand for one word each, `{device}` in an f-string likewise; what follows an ellipsis is left open.
    known = re.sub(r"<[^>]*>|\{[^}]*\}|\[[^\]]*\]", "1", arguments.replace("2>", "").split("…")[0])
    words = [word.rstrip(".,:'") for word in shlex.split(known, comments=True)]
    if application is None:
        return f"{module} takes no arguments" if words else None
    command = typer.main.get_command(application)
    while (names := getattr(command, "commands", None)) is not None:
        if not words or words[0] in ("--help", "1"):
            return None
        if words[0] not in names:
            return f"{module} has no command {words[0]}; it has {', '.join(names)}"
        command, words = names[words[0]], words[1:]
    try:
        command.make_context(module, words, resilient_parsing="--help" in words or not words)
    except Exception as error:  # which class, depends on the parser behind typer
        return None if "does not exist" in str(error) else f"{error}"  # an example's files are not here
    return None


def test_each_command_names_a_module_and_options_that_exist():
    refusals = [
        f"{place}: {command}: {refusal}"
        for place, command in [*_documented(), *_in_sources()]
        for module, arguments in _MODULE.findall(command)
        if (refusal := _refusal(module.rstrip("."), arguments))
    ]
    assert not refusals, "\n".join(refusals)


def test_a_wrong_option_would_be_noticed():
    assert "--plam" in (_refusal("flows.democratize", "--plam") or "")
    assert _refusal("tasks", "compres gptq") is not None
    assert _refusal("tasks", "compress gptq") is None


def test_every_make_target_exists():
    for place, command in _documented():
        for target in re.findall(r"\bmake ([a-z]+)\b", command):
            done = subprocess.run(["make", "-n", target], cwd=PROJECT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{place}: {command}: {done.stderr}"


def _yaml_blocks(name: str) -> list[str]:
    return [block.text for block in blocks(PROJECT / "docs" / name, "yaml")]


def test_the_candidates_and_benchmarks_of_the_settings_page_are_valid(tmp_path):
    yaml = YAML()
    params = yaml.load((PROJECT / "params.yaml").read_text())
    _short, candidates, schema, benchmarks = map(yaml.load, _yaml_blocks("configuration.md"))
    assert list(schema) == ["candidates"]  # the form, with placeholders
    params["candidates"].update(candidates)
    for benchmark in benchmarks["benchmarks"]:
        if "sha256" in benchmark:
            benchmark["sha256"] = "3c1f" + "0" * 60  # the document shortens it
    params["evaluation"].update(benchmarks)
    with (tmp_path / "params.yaml").open("w") as stream:
        yaml.dump(params, stream)
    loaded = load_params(tmp_path / "params.yaml")
    assert set(candidates) < set(loaded.candidates)
    assert len(loaded.evaluation.benchmarks) == len(benchmarks["benchmarks"])


def test_accelerate_accepts_the_launcher_settings(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    (text,) = _yaml_blocks("memory.md")
    (tmp_path / "accelerate.yaml").write_text(text)
    assert load_config_from_file(str(tmp_path / "accelerate.yaml")).num_processes == 4


def test_the_example_rows_are_valid(tmp_path):
    chat, block = blocks(PROJECT / "docs" / "data.md", "json")
    (tmp_path / "chats.jsonl").write_text(chat.text, encoding="utf-8")
    assert inspect("chats.jsonl", tmp_path).used == 1
    path = tmp_path / "questions.jsonl"
    path.write_text(block.text, encoding="utf-8")
    assert [question.id for question in read_questions(path)] == [
        json.loads(line)["id"] for line in block.text.splitlines()
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_python_block_compiles(document):
    for block in blocks(document, "python"):
        compile(block.text, block.place, "exec")
