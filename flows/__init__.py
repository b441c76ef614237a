"""Prefect flows. Importing this package prepares the environment, also in the workers of Prefect, Ray and Dask."""

import sys
from pathlib import Path

from lilliput.errors import ConfigError
from tasks.process.environment import prepare, require_usable_environment

try:
    prepare(Path(__file__).resolve().parent.parent)
    require_usable_environment()
except ConfigError as error:
    print(f"\nerror: {error}", file=sys.stderr)
    sys.exit(2)
