"""Commands answer `--help` and reject wrong arguments without importing what only their work needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.flows.conftest import PROJECT

HEAVY = ("prefect", "mlflow", "dvc", "torch", "transformers", "scipy", "sklearn", "optuna", "matplotlib", "pandas")
COMMANDS = (
    "flows.democratize",
    "flows.search",
    "flows.promote",
    "flows.deploy",
    "flows.publish",
    "tasks",
    "benchmarks",
    "lilliput.serve",
    "lilliput.android",
)
# Runs a command as `python -m` does, then prints its exit code and the heavy modules that it imported.
RUN = """\
import os, runpy, sys
terminal = os.dup(1)  # a stage sends its output to its log
HEAVY = sys.argv.pop(1).split()
module, *arguments = sys.argv[1:]
sys.argv = [module, *arguments]
code = 0
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
os.write(terminal, " ".join(["\\nRESULT", str(code), *(name for name in HEAVY if name in sys.modules)]).encode())
"""


def run(*command: str) -> tuple[list[str], str]:
    """Returns the exit code with the imported heavy modules, and the whole output."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, " ".join(HEAVY), *command], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert "RESULT" in done.stdout, done.stderr
    return done.stdout.rpartition("RESULT")[2].split(), done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    result, output = run(command, "--help")
    assert result == ["0"]
    assert "Usage:" in output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("flows.deploy", "nobody"), "serving: no settings for nobody; params.yaml has under serving: phone-4gb"),
        (("flows.democratize", "--only", "nobody"), "--only: unknown candidate nobody"),
        (("flows.democratize", "--runner", "spark"), "--runner spark: unknown"),
        (("flows.democratize", "--params", "none.yaml"), "none.yaml"),
        (("flows.search", "--search", "none.yaml"), "none.yaml"),
        (("flows.publish", "org/name", "--device", "nobody"), "--device nobody: params.yaml has under devices: "),
        (("flows.promote", "--rollback", "nobody"), "--rollback nobody: no such device under `promotion`"),
        (("flows.promote", "--approve", "nobody"), "nobody: no such device under `promotion`"),
        (("tasks", "compress", "nobody"), "unknown name `nobody`; params.yaml has under candidates: "),
        (("tasks", "offload", "nobody"), "unknown name `nobody`; params.yaml has under serving: "),
    ],
)
def test_wrong_arguments_are_rejected_before_anything_heavy_is_imported(command, message):
    result, output = run(*command)
    assert result == ["2"]
    assert message in output
    assert "Traceback" not in output
