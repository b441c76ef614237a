"""A workflow of one pass (rounding to nearest) by Olive; called again it is found in the cache: `<model> <folder>`."""

import sys

from olive.workflows import run
from usage import so_far, tell

model, folder = sys.argv[1:]
run(
    {
        "input_model": {"type": "HfModel", "model_path": model},
        "passes": {"rtn": {"type": "Rtn", "bits": 4, "group_size": 32, "sym": False}},
        "cache_dir": f"{folder}/cache",
        "output_dir": f"{folder}/out",
        "log_severity_level": 2,
    }
)
tell(**so_far())
