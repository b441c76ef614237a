"""The tests marked `gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import PartFailed
from benchmarks.gpu.record import Job
from benchmarks.record import ROOT

_MARK = "mark.gpu"
_STAND_IN = "a_group_of_zeros_stays_zero"  # for rehearsals: a test of a file with the mark, in milliseconds


def gpu_tests(job: Job) -> dict[str, Any]:
    """Runs all tests marked `gpu`; a rehearsal runs another test of one of their files.

    Raises:
        PartFailed: a test failed, or none passed.
    """
    files = marked_files()
    report = job.folder / "tests.xml"
    chosen = ["-k", _STAND_IN, *(str(file) for file in files if _STAND_IN in file.read_text(encoding="utf-8"))]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={report}"]
    tokenizer = {"LILLIPUT_TEST_TOKENIZER": str(job.tokenizer)} if job.tokenizer else {}
    code = subprocess.run(
        [*command, *(chosen if job.rehearsal else ["-m", "gpu", *map(str, files)])],
        cwd=ROOT,
        env=os.environ | tokenizer,
        stdin=subprocess.DEVNULL,
        check=False,
    ).returncode
    if not report.exists():
        raise PartFailed(f"pytest ended with exit code {code} and wrote no report", {})
    figures = {"files": [str(file.relative_to(ROOT)) for file in files], **outcomes(report)}
    if code or not figures["passed"]:
        bad = figures["failed"] or [f"exit code {code}, {figures['passed']} passed"]
        raise PartFailed(f"tests marked gpu failed: {'; '.join(bad)}", figures)
    return figures


def marked_files() -> list[Path]:
    """Returns the files with a test marked `gpu`; collecting all others would take longer than these tests."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if _MARK in file.read_text(encoding="utf-8")]


def outcomes(report: Path) -> dict[str, Any]:
    """Reads a report in JUnit's format: the number of passed tests, the failed ones, the skipped ones with reasons."""
    passed, failed, skipped = 0, [], {}
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (reason := case.find("skipped")) is not None:
            skipped[name] = reason.get("message") or ""
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}
