"""The command `lilliput`, also `python -m flows`: each sub-command is imported only when it is called."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from flows.engine.output import guarded_output


@dataclass(frozen=True)
class _Command:
    """A sub-command.

    Attributes:
        module: has it as its typer application `app`.
        purpose: one line for `lilliput --help`.
        examples: for its own help.
        options: put before those of the command line.
        stage: its name among several commands of `app`; None if `app` has one.
    """

    module: str
    purpose: str
    examples: tuple[str, ...]
    options: tuple[str, ...] = ()
    stage: str | None = None


COMMANDS = {
    "shrink": _Command(
        "flows.shrink",
        "From a model and your data to a bundle for a device, in one command.",
        (
            "lilliput shrink --data questions.jsonl --device phone-4gb",
            "lilliput shrink my-model/ --data chats.jsonl --device phone-12gb --minutes 120",
            "lilliput shrink Qwen/Qwen3-0.6B --data chats.jsonl --device laptop --plan",
        ),
    ),
    "init": _Command(
        "flows.init",
        "Make a project of your own: settings, sample data, git and DVC.",
        ("lilliput init my-project", "lilliput init ."),
    ),
    "run": _Command(
        "flows.democratize",
        "Make, measure, register and promote the candidates of params.yaml.",
        ("lilliput run", "lilliput run --only gptq", "lilliput run --params examples/tiny.yaml"),
    ),
    "plan": _Command(
        "flows.democratize",
        "Show what a run would do, with its predicted time and memory.",
        ("lilliput plan", "lilliput plan --params examples/tiny.yaml", "lilliput plan --json"),
        options=("--plan",),
    ),
    "search": _Command(
        "flows.search",
        "Search for better chains of strategies.",
        ("lilliput search", "lilliput search --search examples/search.yaml"),
    ),
    "promote": _Command(
        "flows.promote",
        "Decide champions by hand: promote, approve, roll back.",
        ("lilliput promote", "lilliput promote --rollback phone-4gb", "lilliput promote --approve board"),
    ),
    "serve": _Command(
        "flows.deploy",
        "Serve a device's champion, or switch or stop its gateway.",
        ("lilliput serve phone-4gb", "lilliput serve phone-4gb --status", "lilliput serve phone-4gb --stop"),
    ),
    "chat": _Command(
        "flows.chat",
        "Chat with a device's champion in the terminal.",
        ("lilliput chat", "lilliput chat phone-4gb", "lilliput chat --message 'What is the capital of Peru?' --json"),
    ),
    "publish": _Command(
        "flows.publish",
        "Write a champion's folder for the Hugging Face hub, or upload it.",
        ("lilliput publish my-org/pocket --device phone-4gb",),
    ),
    "report": _Command(
        "tasks.__main__",
        "Write report/index.html from the present results.",
        ("lilliput report",),
        stage="report",
    ),
    "params": _Command(
        "flows.settings",
        "Check the settings; show values and where each comes from.",
        ("lilliput params", "lilliput params --show", "lilliput params --show strategies.lora --json"),
    ),
    "doctor": _Command(
        "flows.doctor",
        "Check this machine: each problem with its remedy.",
        ("lilliput doctor", "lilliput doctor --offline --json"),
    ),
}


class _Lazy(TyperCommand):
    """A sub-command that is imported when its arguments are parsed."""

    def __init__(self, name: str, command: _Command) -> None:
        super().__init__(name, help=command.purpose)
        self._command = command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        command = load(self._command)
        return command.make_context(info_name, [*self._command.options, *args], parent, **extra)


def load(command: _Command) -> Any:
    """Returns the sub-command of `command`'s module, with its examples as they are typed after `lilliput`."""
    loaded: Any = typer.main.get_command(importlib.import_module(command.module).app)
    if command.stage:
        loaded = loaded.commands[command.stage]
    loaded.epilog = f"Examples:  {'  ·  '.join(command.examples)}"
    return loaded


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback(epilog="Examples:  lilliput plan  ·  lilliput run  ·  lilliput chat phone-4gb  ·  lilliput doctor")
def _root() -> None:
    """Make a language model small enough for a phone, measure it, and serve it."""


def command_line() -> TyperGroup:
    """Returns the command with all sub-commands."""
    group = cast("TyperGroup", typer.main.get_command(app))
    for name, command in COMMANDS.items():
        group.add_command(_Lazy(name, command))
    return group


def main() -> None:
    """Runs the command line of this process."""
    with guarded_output():
        command_line()(prog_name="lilliput")


if __name__ == "__main__":
    main()
