"""The command blocks of README.md and docs/ run as written, in a fresh copy of the project (exceptions: see below).

`make documents`. The copy uses the tiny configuration, so that a run takes minutes. The tests are one story, in the
order of the documents: a command finds what the commands before it made.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.documents.reading import DOCUMENTS, PROJECT, Block, blocks
from tests.flows.conftest import Clone, ask_prefect, copy_project

pytestmark = [pytest.mark.documents, pytest.mark.timeout(3600)]

# Commands that are left out, each with what it would take.
LEFT_OUT = {
    "make test": "the suite that this test belongs to",
    "make services": "a separate suite",
    "apt-get install postgresql": "changes the machine",
    "python3.11 -m venv .venv": "`make demo` installs by the same commands",
    ".venv/bin/pip install": "likewise",
    "pip install --no-deps --requirement requirements-team.lock": "likewise, `make services`",
    "ray start": "a cluster of several machines",
    "dask scheduler": "a cluster of several machines",
    "cd /shared/lilliput": "a cluster of several machines",
    "docker ": "a Docker daemon",
    "adb pair": "a phone",
    "python -m lilliput.android": "a phone",
    "python -m flows.publish my-org/pocket --device phone-4gb --upload": "an account on the hub",
    "dvc remote": "a bucket; `make services` has one",
    "prefect deployment run 'democratize/pipeline' -p runner=ray": "Ray runs in the block before",
}
# Commands that refuse in this story, with the documented exit code and a part of the message.
REFUSED = {
    "python -m flows.promote --approve board": "waits for approval",
}
# What a message asks for before the next command makes sense.
NEXT = {
    "python -m flows.promote --rollback phone-4gb": "dvc repro",
    "LILLIPUT_TOKEN=…": "python -m flows.deploy phone-4gb --stop",  # one gateway per folder
    "curl --fail --cacert": "python -m flows.deploy phone-4gb --stop",
}
# Programs that go on until they are ended, and the address or file that is there once they are up.
SERVERS = {
    "prefect server start": "http://127.0.0.1:{prefect}/api/health",
    "prefect worker start": None,
    "nginx -p": None,
    "python -m lilliput.serve": "http://127.0.0.1:8080/health",
    "scripts/services.py start": "{services}/client.env",
}
# Parts of commands that this test replaces: to be brief, to stay on loopback, to write into its own folder.
REPLACED = {
    "--trials 20 --minutes 120": "--trials 1 --minutes 5",
    "--trials 40 --minutes 480": "--trials 1 --minutes 5",
    "--runner dask --workers 2": "--runner dask --workers 2 --trials 2",
    "--host 0.0.0.0": "--host 127.0.0.1",
    "LILLIPUT_TOKEN=…": "LILLIPUT_TOKEN=a-token-of-this-test",
    "export HF_TOKEN=…": "export HF_TOKEN=",
    "/tmp/automations.yaml": "logs/automations.yaml",
    "2>&1 &": "2>&1",
    "/srv/lilliput": "{services}",
    "4200": "{prefect}",
}
_KEPT_FOR_THE_BLOCK = re.compile(r"(export |\. |\w+=\$\()")


class Story:
    """Runs commands one after another in a copy of the project, as one user at its terminals would."""

    def __init__(self, clone: Clone, prefect_port: int, services: Path) -> None:
        self.clone, self.prefect_port, self.services = clone, prefect_port, services
        self.done: set[str] = set()
        self._servers: list[subprocess.Popen[bytes]] = []

    def run(self, block: Block) -> None:
        """Runs the commands of `block` that have not been run before; ends the servers that they start.

        A block of Prefect's commands that starts no server expects one to be up.

        Raises:
            AssertionError: a command ended with another exit code than the documents promise.
        """
        kept: list[str] = []
        try:
            if _needs_prefect_server(block):
                kept.append(f"export PREFECT_API_URL=http://127.0.0.1:{self.prefect_port}/api")
                self._start(block.place, "prefect server start", SERVERS["prefect server start"])
            for command in block.commands:
                written = self._as_run_here(command)
                if _KEPT_FOR_THE_BLOCK.match(command):
                    kept.append(written)
                elif not _entry_for(command, LEFT_OUT) and not self._is_repeated(command):
                    self._run(block.place, command, "\n".join([*kept, written]))
            if any(command.startswith("prefect deployment run") for command in block.commands):
                self._wait_for_flow_runs()
        finally:
            self._end_servers()

    def _filled(self, text: str) -> str:
        return text.format(prefect=self.prefect_port, services=self.services)

    def _is_repeated(self, command: str) -> bool:
        bare = " ".join(command.partition(" #")[0].split())
        # Each block has a Prefect server of its own, and a deployment may follow a promotion.
        repeated = bare in self.done and not bare.startswith(("prefect", "python -m flows.deploy", "lilliput serve"))
        self.done.add(bare)
        return repeated

    def _as_run_here(self, command: str) -> str:
        for part, instead in REPLACED.items():
            command = command.replace(part, self._filled(instead))
        # The installed `lilliput` belongs to the folder that it was installed from, not to this copy.
        return re.sub(r"^lilliput ", "python -m flows ", command)

    def _run(self, place: str, command: str, script: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {place}: {command}", flush=True)
        _add_second_champion(self, command)
        if server := _entry_for(command, SERVERS):
            return self._start(place, script, SERVERS[server])
        refusal = _entry_for(command, REFUSED)
        done = self.clone.run("bash", "-euc", script, timeout_s=1500)
        said = f"{place}: {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == (2 if refusal else 0), said
        assert not refusal or REFUSED[refusal] in " ".join((done.stdout + done.stderr).split()), said
        if following := _entry_for(command, NEXT):
            self._run(place, NEXT[following], NEXT[following])

    def _start(self, place: str, script: str, sign: str | None) -> None:
        log = self.clone.folder / "logs" / f"server-{len(self._servers)}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["bash", "-euc", script],
                cwd=self.clone.folder,
                env=self.clone.environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        # A shell notices when its programs end; here a thread does, or `services.py stop` would wait for a zombie.
        threading.Thread(target=process.wait, daemon=True).start()
        self._servers.append(process)
        deadline = time.monotonic() + 300
        time.sleep(10)  # long enough for a wrong option or a missing setting to be refused
        while sign and not _is_there(self._filled(sign)):
            assert process.poll() is None and time.monotonic() < deadline, f"{place}: {log.read_text()[-3000:]}"
            time.sleep(0.5)
        assert process.poll() is None, f"{place}: ended at once: {log.read_text()[-3000:]}"

    def _wait_for_flow_runs(self) -> None:
        """Waits until the worker has done what the block asked for, and checks that every run completed."""
        api = f"http://127.0.0.1:{self.prefect_port}/api"

        def count(*states: str) -> int:
            wanted = {"flow_runs": {"state": {"type": {"any_": states}}}}
            return ask_prefect(api, "/flow_runs/count", wanted)

        deadline = time.monotonic() + 1500
        while count("SCHEDULED", "PENDING", "RUNNING"):
            assert time.monotonic() < deadline, "a flow run does not end"
            time.sleep(2)
        assert count("FAILED", "CRASHED", "CANCELLED") == 0
        assert count("COMPLETED") > 0

    def _end_servers(self) -> None:
        for process in reversed(self._servers):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._servers.clear()


def _needs_prefect_server(block: Block) -> bool:
    asks = any(command.startswith(("prefect", "id=")) for command in block.commands)
    return asks and not any(command.startswith("prefect server start") for command in block.commands)


def _is_there(sign: str) -> bool:
    """Whether the address `sign` answers, or the file exists."""
    if not sign.startswith("http"):
        return Path(sign).exists()
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(sign, trust_env=False).is_success
    return False


def _add_second_champion(story: Story, command: str) -> None:
    """Lets the phone have `pocket`, too, once the experiment before has remade it: `lora` is then the one before."""
    if command.startswith("python -m flows.democratize --plan"):
        story.clone.set_param("compile.pocket-gguf", {"candidate": "pocket", "target": "gguf"})


def _entry_for(command: str, table: dict[str, str] | dict[str, str | None]) -> str | None:
    """The entry of `table` that `command` is a case of."""
    return next((beginning for beginning in table if beginning in command), None)


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture(scope="module")
def story(tokenizer, tmp_path_factory) -> Iterator[Story]:
    """A copy of the project in which one phone gets two champions in turn: `lora`, then the smaller `pocket`."""
    del tokenizer  # skips where the wheels cannot be had
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")) and shutil.which("initdb") is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    if missing := [name for name in ("nginx", "openssl", "curl") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install nginx-light openssl curl")
    if _is_there("http://127.0.0.1:8080/health"):
        pytest.fail("a gateway serves on port 8080 already, which the documents name; stop it first")
    clone = copy_project(tmp_path_factory.mktemp("documents"))
    shutil.copyfile(PROJECT / "examples" / "tiny.yaml", clone.folder / "params.yaml")
    (clone.folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    shutil.copystat(PROJECT / "requirements.lock", clone.folder / "requirements.lock")  # installed, as `make` sees it
    clone.set_param("candidates.gptq", {"from": "base", "apply": "gptq"})
    clone.set_param("caching.candidates", [])
    clone.set_param("compile", {"lora-gguf": {"candidate": "lora", "target": "gguf", "floats": "f16"}})
    clone.set_param("promotion.phone-4gb", {"prefer": "size", "max_accuracy_drop": 0.9, "max_hallucination_rise": 0.9})
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")
    assert clone.run(*git, "commit", "-qam", "tiny").returncode == 0
    prefect_port = _free_port()
    clone.environment |= {
        "PREFECT_SERVER_API_PORT": str(prefect_port),
        "SLACK_URL": "http://127.0.0.1:9/hook",  # stored in a block, never called
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@example.org",
    }
    services = Path(tempfile.mkdtemp(prefix="lilliput-documents-"))
    services.chmod(0o711)  # pytest's own folders are closed to the user who runs PostgreSQL
    yield Story(clone, prefect_port, services)
    clone.run("python", "-m", "flows.deploy", "phone-4gb", "--stop")
    shutil.rmtree(services)


def test_the_main_job_of_the_readme_runs(story):
    demo, *_ = blocks(PROJECT / "README.md", "sh")
    story.run(demo)


@pytest.mark.parametrize(
    "block",
    [block for document in DOCUMENTS for block in blocks(document, "sh")][1:],
    ids=lambda block: block.place,
)
def test_a_block_runs_as_written(story, block):
    # No block knows what another one told its Prefect server.
    story.clone.environment["PREFECT_HOME"] = str(story.clone.folder / "prefect" / re.sub(r"\W+", "-", block.place))
    story.run(block)


def test_the_python_of_the_operations_page_runs(story):
    (block,) = blocks(PROJECT / "docs" / "operations.md", "python")
    done = story.clone.run("python", "-c", block.text)
    assert done.returncode == 0, done.stderr


def test_nothing_but_the_source_has_to_change_for_questions_of_ones_own(story):
    questions = [
        f'{{"id": "colour/{name}", "question": "What colour is a {name}?", "answer": "{colour}", "group": "{name}"}}'
        for name, colour in [("poppy", "red"), ("swan", "white"), ("raven", "black"), ("lemon", "yellow")]
    ]
    (story.clone.folder / "my-questions.jsonl").write_text("\n".join(questions) + "\n")
    story.clone.set_param("data.source", "my-questions.jsonl")
    story.clone.set_param("caching.candidates", ["pocket"])
    done = story.clone.run("python", "-m", "flows.democratize", "--plan")
    assert done.returncode == 0, done.stderr
    done = story.clone.run("python", "-m", "tasks", "data")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "table", [LEFT_OUT, REFUSED, NEXT, SERVERS, REPLACED], ids=["out", "refused", "next", "servers", "replaced"]
)
def test_each_exception_above_is_still_needed(table):
    text = "\n".join(block.text for document in DOCUMENTS for block in blocks(document, "sh"))
    assert not [part for part in table if part not in text]
