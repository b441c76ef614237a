"""Publishing with the real client of the hub to a fake hub on loopback."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from lilliput.artifacts import MANIFEST, Manifest, file_sha256, seal, verify, write_json
from lilliput.errors import ArtifactError, PublishError
from tasks import layout
from tasks.publish import prepare, upload
from tasks.registry import get_or_create, model_versions
from tasks.registry.version_records import CompiledModel, Role, VersionRecord, read_roles, write_version_record
from tests import results

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def champion(tmp_path, monkeypatch):
    """The champion's version, in a folder with a candidate, its compiled model and the bundle of phone-4gb."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model, compiled, bundle = layout.model("pocket"), layout.compiled("pocket", "gguf"), layout.BUNDLES / "phone-4gb"
    for folder in (model, compiled, bundle):
        folder.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    common = {"config": {"candidate": "pocket", "target": "gguf"}, "parameters": 1, "facts": {"candidate": "pocket"}}
    parent = seal(model, candidate="pocket", strategy="gptq", parent=None, **common)
    (compiled / "model.gguf").write_bytes(b"GGUF")
    form = seal(compiled, candidate="pocket-gguf", strategy="gguf", parent=parent, **common)
    (bundle / "model.gguf").write_bytes(b"GGUF")
    (bundle / "README.md").write_text("# pocket for phone-4gb\n\nStart: `llama-server`\n")
    seal(bundle, candidate="pocket-gguf", strategy="bundle", parent=form, **common)
    write_json(layout.metrics("pocket"), results.evaluation())
    quality = results.quality(accuracy_choice=results.figure(0.73, 0.04, n=400))
    write_json(
        layout.devices("pocket-gguf"), results.device_record({"phone-4gb": results.device_run()}, quality=quality)
    )
    decision = {"device": "phone-4gb", "champion": "pocket", "reason": "has the best accuracy", "refused": {}}
    write_json(layout.PROMOTION, {"phone-4gb": decision | {"compiled": None}})
    return registered_champion({"gguf": file_sha256(compiled / MANIFEST)})


def registered_champion(compiled):
    """Registers a version whose compiled models have these sha256 as champion of phone-4gb; returns its number."""
    client = model_versions.client()
    get_or_create.ensure_model(client)
    run_id = client.create_run(get_or_create.experiment_id(client)).info.run_id
    forms = {target: CompiledModel(folder="", manifest_sha256=digest) for target, digest in compiled.items()}
    record = VersionRecord(parent_sha256="", folder="", git_commit=None, dvc={}, compiled=forms, measured=None)
    write_version_record(run_id, record)
    tags = {"lilliput.candidate": "pocket"}
    version = client.create_model_version("lilliput", source="file:///nowhere", run_id=run_id, tags=tags).version
    model_versions.set_alias("champion-phone-4gb", str(version))
    return str(version)


def published(version):
    return read_roles(model_versions.client().get_model_version("lilliput", version)).get("phone-4gb", Role()).published


@pytest.fixture
def hub(monkeypatch):
    """A fake of the hub's API for commits of small files; `files` holds the committed files."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    seen = SimpleNamespace(files={}, repositories=[], tokens=set(), refuse=False)

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            seen.tokens.add(self.headers["Authorization"])
            status = 403 if seen.refuse else 200
            self._answer(status, {"error": "no right to write here"} if seen.refuse else self._do(body))

        def _do(self, body):
            if self.path == "/api/repos/create":
                seen.repositories.append(json.loads(body))
                return {"url": f"{seen.address}/org/pocket"}
            if self.path == "/api/validate-yaml":
                return {"errors": [], "warnings": []}
            if "/preupload/" in self.path:
                files = json.loads(body)["files"]
                return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    seen.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{seen.address}/org/pocket/commit/abc", "commitOid": "abc", "pullRequestUrl": None}

        def _answer(self, status, value):
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    seen.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_uploaded_bundle_has_a_card_and_verifies(champion, tiny_params, hub, tmp_path):
    publication = prepare(tiny_params, "phone-4gb")
    assert hub.files == {}  # preparing uploads nothing
    address = upload(publication, "org/pocket", "secret", private=True, endpoint=hub.address)
    assert address.endswith("/commit/abc")
    assert published(champion) == address
    assert hub.tokens == {"Bearer secret"}
    assert hub.repositories[0]["visibility"] == "private"
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, content in hub.files.items():
        (downloaded / name).write_bytes(content)
    assert (
        verify(downloaded).parent_sha256
        == Manifest.model_validate_json((layout.compiled("pocket", "gguf") / MANIFEST).read_text()).artifact_sha256
    )
    assert hub.files["model.gguf"] == b"GGUF"
    card = hub.files["README.md"].decode()
    assert "- Accuracy, four choices: 0.730 (0.690 – 0.770, n = 400)" in card  # of the file, not of its checkpoint
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "Start: `llama-server`" in card
    assert "| Accuracy, four choices | 0.500 |" in card
    assert {file.path: file.sha256 for file in publication.files} == {
        name: hashlib.sha256(content).hexdigest() for name, content in hub.files.items()
    }


def test_an_altered_bundle_is_not_published(champion, tiny_params):
    (layout.BUNDLES / "phone-4gb" / "model.gguf").write_bytes(b"gguf")
    with pytest.raises(ArtifactError, match="altered"):
        prepare(tiny_params, "phone-4gb")


def test_a_bundle_of_another_model_than_the_champion_is_not_published(champion, tiny_params):
    registered_champion({"gguf": "0" * 64})
    with pytest.raises(PublishError, match="not the champion"):
        prepare(tiny_params, "phone-4gb")
    with pytest.raises(PublishError, match="no champion"):
        prepare(tiny_params, "laptop")


def test_a_refusal_by_the_hub_is_reported(champion, tiny_params, hub):
    hub.refuse = True
    with pytest.raises(PublishError, match="org/pocket"):
        upload(prepare(tiny_params, "phone-4gb"), "org/pocket", "secret", private=True, endpoint=hub.address)
    with pytest.raises(PublishError, match="org/pocket"):
        upload(prepare(tiny_params, "phone-4gb"), "org/pocket", "secret", private=True, endpoint="http://127.0.0.1:9")
    assert published(champion) is None
