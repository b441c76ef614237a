"""The deployment folder, and the gateway process that serves it."""

import hashlib
import json
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from lilliput.artifacts import seal, writing
from lilliput.cache.answers import AnswerCache, CachedAnswer
from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.errors import ArtifactError, ConfigError
from lilliput.llama_server.process import cpu_clock
from lilliput.serve.deployment import (
    DeployedModel,
    Deployment,
    admin_token,
    deploy,
    read_current,
    remove_unused,
    roll_back,
    store_model,
    store_router,
    verified_model_file,
)
from lilliput.serve.factory import answers_version
from tests.embedding.fakes import BagOfWords

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("modules", "slow"),
    [
        ("lilliput.serve.__main__, lilliput.serve.factory", ("torch", "transformers", "scipy", "httpx")),
        ("flows.deploy", ("pydantic", "httpx", "numpy", "rich")),
    ],
    ids=["gateway", "command"],
)
def test_slow_libraries_are_not_imported(modules, slow):
    """They take seconds and hundreds of MiB; `--status` and `--stop` need none."""
    code = f"import sys, {modules}; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("answer", [b"no HTTP\r\n", b""], ids=["other protocol", "closes"])
def test_status_of_a_gateway_that_does_not_answer_is_one_message(tmp_path, monkeypatch, answer):
    from flows import deploy as flow

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(flow, "running", lambda home: {"url": url, "pid": 7})

        def respond():
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(answer)

        thread = threading.Thread(target=respond)
        thread.start()
        with pytest.raises(ArtifactError, match=rf"{url}/status: the gateway does not answer"):
            flow.status(tmp_path)
        thread.join()


def test_gateway_of_a_failed_deployment_is_killed_and_its_files_are_restored(tmp_path):
    from flows import deploy as flow

    (tmp_path / "current.json").write_text("earlier")
    with (
        pytest.raises(ArtifactError, match="no champion"),
        flow._restored_after_errors(tmp_path),
        flow._spawn(tmp_path, flow.Address(port=0)) as starting,
    ):
        (tmp_path / "current.json").write_text("new")
        (tmp_path / "previous.json").write_text("earlier")
        raise ArtifactError("no champion")
    starting._process.wait(30)
    assert starting._process.returncode == -signal.SIGKILL
    assert (tmp_path / "current.json").read_text() == "earlier"
    assert not (tmp_path / "previous.json").exists()
    assert (tmp_path / "gateway.log").read_bytes() == b""


def test_held_gateway_ends_silently_with_its_standard_input(tmp_path):
    command = [sys.executable, "-m", "lilliput.serve", str(tmp_path), "--held", "--port", "0"]
    done = subprocess.run(command, cwd=PROJECT, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert [*tmp_path.iterdir()] == []


def test_cpu_clock_of_another_process():
    work = "sum(range(10**7)); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        clock = cpu_clock(process.pid)
        assert process.stdout and process.stdout.readline()
        used = psutil.Process(process.pid).cpu_times()
        assert clock() == pytest.approx(used.user + used.system, abs=0.1)
        process.kill()
        process.wait()
        assert clock() is None


@pytest.fixture
def deployment(tiny_params):
    def make(name, sha256, router=None, **serving):
        settings = tiny_params.serving["phone-4gb"].model_copy(update={"policy": "threshold", **serving})
        return Deployment(
            device="phone-4gb",
            model=DeployedModel(name=name, sha256=sha256, version="1"),
            edge=DeployedModel(name=name, sha256=sha256),
            serving=settings,
            links=tiny_params.links,
            profile=tiny_params.devices["phone-4gb"],
            system_prompt="Answer briefly.",
            router=router,
            embedder=tiny_params.caching.embedder,
            threshold=None,
        )

    return make


def compiled(folder, name, content=b"weights"):
    with writing(folder / name) as partial:
        (partial / "model.gguf").write_bytes(content)
        sealed = seal(
            partial,
            candidate=f"{name}-gguf",
            strategy="gguf",
            config={},
            parent=None,
            parameters=1,
            facts={},
        )
    return folder / name, sealed.artifact_sha256


def test_models_are_kept_while_a_rollback_needs_them(tmp_path, deployment):
    home, shas = tmp_path / "home", []
    for name in ("one", "two", "three"):
        folder, sha256 = compiled(tmp_path, name, name.encode())
        store_model(folder, home, sha256)
        shas.append(sha256)
        deploy(deployment(name, sha256), home)
        remove_unused(home)
    assert {folder.name for folder in (home / "models").iterdir()} == set(shas[1:])
    assert roll_back(home).model.name == "two"
    assert roll_back(home).model.name == "three"
    current = read_current(home)
    assert verified_model_file(current, current.model, home).read_bytes() == b"three"


def test_repeated_deployment_keeps_the_previous_one(tmp_path, deployment):
    for name in ("one", "two", "two"):
        deploy(deployment(name, hashlib.sha256(name.encode()).hexdigest()), tmp_path)
    assert roll_back(tmp_path).model.name == "one"


def test_deployed_router_is_independent_of_later_fits(tmp_path, deployment):
    home, fitted, kept = tmp_path / "home", tmp_path / "offload", []
    fitted.mkdir()
    with pytest.raises(ArtifactError, match="no router is fitted yet"):
        store_router(fitted, home)
    for text in ("first", "second", "third"):
        (fitted / "router.json").write_text(text)
        kept.append(store_router(fitted, home))
        deploy(deployment("one", "1" * 64, kept[-1]), home)
        remove_unused(home)
    found = {folder.name: (folder / "router.json").read_text() for folder in (home / "routers").iterdir()}
    assert found == {kept[1]: "second", kept[2]: "third"}
    assert roll_back(home).router == kept[1]


def test_rollback_without_a_previous_deployment_is_rejected(tmp_path, deployment):
    deploy(deployment("one", "1" * 64), tmp_path)
    with pytest.raises(ArtifactError, match="no previous deployment to roll back to"):
        roll_back(tmp_path)


def test_model_that_was_not_promoted_is_rejected(tmp_path):
    folder, _ = compiled(tmp_path, "one")
    with pytest.raises(ArtifactError, match="holds another model"):
        store_model(folder, tmp_path / "home", "0" * 64)
    assert not (tmp_path / "home").exists()


def test_altered_model_is_rejected(tmp_path, deployment):
    folder, sha256 = compiled(tmp_path, "one")
    store_model(folder, tmp_path, sha256)
    file = tmp_path / "models" / sha256 / "model.gguf"
    file.unlink()
    file.write_bytes(b"wEights")
    found = deployment("one", sha256)
    with pytest.raises(ArtifactError, match="altered"):
        verified_model_file(found, found.model, tmp_path)


def test_invalid_deployment_file_is_rejected(tmp_path):
    (tmp_path / "current.json").write_text('{"device": "x"}')
    with pytest.raises(ArtifactError, match="not a valid deployment"):
        read_current(tmp_path)


def test_admin_token_is_stable_and_private(tmp_path):
    token = admin_token(tmp_path)
    assert admin_token(tmp_path) == token
    assert len(token) > 30
    assert stat.S_IMODE((tmp_path / "admin-token").stat().st_mode) == 0o600


def test_cache_version_changes_with_all_that_determines_answers(deployment):
    first = deployment("one", "1" * 64)
    pair = ("a" * 64, "b" * 64)
    changed = {
        "system prompt": first.model_copy(update={"system_prompt": "Answer at length."}),
        "router": first.model_copy(update={"router": "c" * 64}),
        "context": first.model_copy(update={"profile": first.profile.model_copy(update={"context_tokens": 1024})}),
    }
    versions = [answers_version(other, pair) for other in (first, *changed.values())]
    versions += [answers_version(first, ("d" * 64, pair[1])), answers_version(first, (pair[0], "http://edge large"))]
    assert len(set(versions)) == len(versions) == 6
    battery = first.model_copy(update={"serving": first.serving.model_copy(update={"battery_wh": 5.0})})
    assert answers_version(battery, pair) == versions[0]


def test_clear_cache_affects_one_device(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from flows import deploy as flow

    monkeypatch.setattr(flow, "folder_of", lambda _: tmp_path)
    for device in ("phone-4gb", "laptop"):
        home = tmp_path / "deployments" / device
        home.mkdir(parents=True)
        cache = AnswerCache(home / "answers.db", BagOfWords(), "v", 0.5, 10)
        cache.store(cache.query("Where is Peru?"), CachedAnswer("there", "device", "m", 1, 2))
    result = CliRunner().invoke(flow.app, ["phone-4gb", "--clear-cache"])
    assert (result.exit_code, result.output) == (0, "phone-4gb: 1 cached answers deleted\n")
    assert cache.count() == 1
    result = CliRunner().invoke(flow.app, ["laptop", "--clear-cache", "--stop"])
    assert result.exit_code == 2


def test_proxies_of_a_running_gateway_cannot_be_changed():
    from flows import deploy as flow

    gateway = {"url": "http://127.0.0.1:8080", "pid": 1}
    with pytest.raises(ConfigError, match=r"a gateway runs at http://127.0.0.1:8080.*--stop"):
        flow._require_restart(gateway, flow.Address(proxies=("127.0.0.1",)))
    flow._require_restart(gateway, flow.Address())
    flow._require_restart(None, flow.Address(proxies=("127.0.0.1",)))


@pytest.fixture(scope="module")
def models(checkpoint, tmp_path_factory):
    """One tiny model, compiled in 32 and in 16 bits."""
    folder, made = tmp_path_factory.mktemp("models"), []
    for name, kind in (("first", "f32"), ("second", "f16")):
        with writing(folder / name) as partial:
            compile_gguf(checkpoint, partial, GgufTarget(candidate="s", target="gguf", floats=kind, embeddings=kind))
            sealed = seal(partial, candidate=name, strategy="gguf", config={}, parent=None, parameters=1, facts={})
        made.append((folder / name, sealed.artifact_sha256))
    return made


@pytest.mark.slow
def test_a_served_champion_is_replaced_under_load_and_rolled_back(models, deployment, tmp_path, monkeypatch):
    """No concurrent request is lost."""
    from flows import deploy as flow

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    home = tmp_path / "home"
    (_, first_sha), (_, second_sha) = models
    nothing = {"cache": deployment("x", "0" * 64).serving.cache.model_copy(update={"capacity": 0})}
    for folder, sha256 in models:
        store_model(folder, home, sha256)
    deploy(deployment("first", first_sha, **nothing), home)
    url = flow._start(home, flow.Address(port=0))
    try:
        body = {"messages": [{"role": "user", "content": "What is the capital of Peru?"}], "max_tokens": 4}
        answers, done = [], threading.Event()

        def load():
            with httpx.Client(timeout=60) as client:
                while not done.is_set():
                    answers.append(client.post(f"{url}/v1/chat/completions", json=body))

        clients = [threading.Thread(target=load) for _ in range(3)]
        for client in clients:
            client.start()
        served = [flow.status(home)["version"]]
        for change in (lambda: deploy(deployment("second", second_sha, **nothing), home), lambda: roll_back(home)):
            time.sleep(0.5)
            change()
            assert flow._take_over(home, flow.running(home)) == url
            served.append(flow.status(home)["version"])
        time.sleep(0.5)
        done.set()
        for client in clients:
            client.join()
        assert served == [first_sha, second_sha, first_sha]
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["model"] for answer in answers} == {"first", "second"}
        assert httpx.post(f"{url}/deployment", headers={"x-lilliput-admin": "guess"}).status_code == 401

        current = json.loads((home / "current.json").read_text())
        (home / "current.json").write_text(json.dumps(current | {"model": current["model"] | {"sha256": "0" * 64}}))
        with pytest.raises(ArtifactError, match="the previous deployment is still served"):
            flow._take_over(home, flow.running(home))
        (home / "current.json").write_text(json.dumps(current))
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200

        process = flow.running(home)["pid"]
        for model in psutil.Process(process).children():
            model.kill()
        deadline = time.monotonic() + 60
        while httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code != 200:
            assert time.monotonic() < deadline, "the models were not restarted"
            time.sleep(0.2)
    finally:
        assert "is no longer served" in flow.stop(home)
    assert flow.running(home) is None
    assert not psutil.pid_exists(process)


@pytest.mark.slow
def test_second_gateway_is_rejected_and_the_first_can_be_stopped(models, deployment, tmp_path):
    from flows import deploy as flow

    folder, sha256 = models[0]
    home = tmp_path / "phone-4gb"
    store_model(folder, home, sha256)
    nothing = {"cache": deployment("x", "0" * 64).serving.cache.model_copy(update={"capacity": 0})}
    deploy(deployment("first", sha256, policy="device", **nothing), home)
    url = flow._start(home, flow.Address(port=0))
    try:
        first = flow.running(home)["pid"]
        with pytest.raises(ArtifactError, match=rf"another gateway serves this folder \(process {first}, {url}\)"):
            flow._start(home, flow.Address(port=0))
        assert flow.status(home)["pid"] == first
    finally:
        ended = flow.stop(home)
    assert ended == f"{url} is no longer served"
    assert not psutil.pid_exists(first)


@pytest.mark.slow
def test_killed_gateway_ends_its_models_and_can_restart(models, deployment, tmp_path):
    from flows import deploy as flow

    folder, sha256 = models[0]
    home = tmp_path / "phone-4gb"
    store_model(folder, home, sha256)
    nothing = {"cache": deployment("x", "0" * 64).serving.cache.model_copy(update={"capacity": 0})}
    deploy(deployment("first", sha256, policy="device", **nothing), home)
    flow._start(home, flow.Address(port=0))
    gateway = psutil.Process(flow.running(home)["pid"])
    served = gateway.children(recursive=True)
    gateway.kill()
    assert served and psutil.wait_procs(served, timeout=20)[1] == []
    assert flow.running(home) is None
    url = flow._start(home, flow.Address(port=0))
    try:
        body = {"messages": [{"role": "user", "content": "What is the capital of Peru?"}], "max_tokens": 4}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    finally:
        flow.stop(home)


@pytest.mark.slow
def test_start_error_gives_the_reason(tmp_path):
    from flows import deploy as flow

    with pytest.raises(ArtifactError, match="nothing is deployed here"):
        flow._start(tmp_path, flow.Address(port=0))
    with pytest.raises(ArtifactError, match="beyond loopback a bearer token is required"):
        flow._start(tmp_path, flow.Address("0.0.0.0", 0))
