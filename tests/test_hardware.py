import subprocess
import sys

import pytest
import torch

from lilliput import hardware


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hardware._processor_multiplies_bfloat16.cache_clear()
    yield monkeypatch
    hardware._processor_multiplies_bfloat16.cache_clear()


def test_a_processor_without_the_instructions_is_not_tried(without_gpu):
    without_gpu.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    without_gpu.setattr(subprocess, "run", lambda *args, **options: pytest.fail("tried"))
    assert not hardware.multiplies_bfloat16()


@pytest.mark.parametrize(("program", "works"), [("", True), ("import os; os.abort()", False)])
def test_a_processor_that_ends_the_process_does_not_multiply_bfloat16(without_gpu, program, works):
    without_gpu.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    without_gpu.setattr(hardware, "_PRODUCT", program)
    assert hardware.multiplies_bfloat16() == works


def test_the_tried_product_has_no_fault_of_its_own():
    """A processor may end the process by a signal; Python must not reject the program."""
    done = subprocess.run([sys.executable, "-c", hardware._PRODUCT], capture_output=True, check=False)
    assert done.returncode <= 0, done.stderr
