"""What a process has used so far, by the system's own account; for peers' interpreters, so of the standard library."""

import json
import os
import resource
import time
from pathlib import Path


def so_far() -> dict[str, float]:
    """Seconds since it was started (imports included), CPU-seconds and peak memory."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    # ru_maxrss begins at the size of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return {
        "seconds": time.time() - float(os.environ["BENCH_STARTED"]),
        "cpu_seconds": own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
        "peak_rss_bytes": peak_kib * 1024,
    }


def tell(**facts: object) -> None:
    """Says `facts` to whoever started this process."""
    print("BENCH " + json.dumps(facts), flush=True)


def folder_bytes(folder: str) -> int:
    """Of the weights in `folder`."""
    return sum(path.stat().st_size for path in Path(folder).glob("**/*.safetensors"))
