"""Datasets of a hub on loopback, through the library `datasets` in a process of its own: it reads its settings once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.ingestion.hub import COMMIT, REPOSITORY, serving

READ = """
import json, sys
from pathlib import Path
from lilliput.errors import SourceError
from lilliput.ingestion.intake import Intake
def read(source):
    try:
        return [f"{row.user_text} {row.split}" for row in Intake(source, Path()).rows()]
    except SourceError as error:
        return ["temporary" if error.temporary else "final", str(error)]
print(json.dumps([read(source) for source in sys.argv[1:]]))
"""
OTHER = "1" * 40
OFFLINE = "http://127.0.0.1:9"


def lines(*texts: str) -> bytes:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]} for text in texts
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(sources: list[str], home: Path, address: str, **environment: str) -> list[list[str]]:
    """Reads `sources` in a fresh process; returns their rows, or kind and message of the error."""
    cleared = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", READ, *sources], env=cleared | settings, capture_output=True, text=True, check=True
    )
    assert "Repo card" not in done.stderr
    return json.loads(done.stdout)


def hub(commit: str = COMMIT, query: str = "") -> str:
    return f"hub:{REPOSITORY}@{commit}{query}"


def test_the_splits_of_a_dataset_are_the_sides_online_and_from_the_cache(tmp_path):
    files = {"README.md": b"# Chats\n", "data/train.jsonl": lines("a", "b"), "data/test.jsonl": lines("c")}
    with serving(files) as (address, requests):
        assert read([hub()], tmp_path, address) == [["a train", "b train", "c test"]]
        assert not [request for request in requests if REPOSITORY in request and COMMIT not in request]
    rows, other = read([hub(), hub(OTHER)], tmp_path, OFFLINE, HF_HUB_OFFLINE="1")
    assert rows == ["a train", "b train", "c test"]
    assert other[0] == "temporary"
    assert "the cache has another commit only" in other[1]


def test_an_unknown_dataset_split_and_config_are_named(tmp_path):
    files = {"train.jsonl": lines("a"), "validation.jsonl": lines("b")}
    sources = [hub(OTHER), hub(), hub(query="?split=dev"), hub(query="?split=validation"), hub(query="?config=en")]
    with serving(files) as (address, _):
        unknown, undecided, wrong, validation, config = read(sources, tmp_path, address)
    assert unknown[0] == "final"
    assert "is not on the hub" in unknown[1] and "correct the name or the commit" in unknown[1]
    assert "has the splits train, validation; choose one by `?split=<name>`" in undecided[1]
    assert "'dev' is none of them" in wrong[1]
    assert validation == ["b None"]
    assert "choose a config by `?config=<name>`" in config[1]
    with serving({"data/train-00000-of-00001.jsonl": lines("a", "b")}) as (address, _):
        assert read([hub()], tmp_path / "single", address) == [["a None", "b None"]]  # some of them are held out
    ((kind, message),) = read([hub()], tmp_path / "empty", OFFLINE, HF_HUB_OFFLINE="1")
    assert kind == "temporary"
    assert "unset HF_HUB_OFFLINE" in message
