"""Makes each peer an environment of its own, `.bench/<peer>/`, from benchmarks/peers/<peer>.txt.

python -m benchmarks.environments            # all of them
python -m benchmarks.environments olive trl
"""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from benchmarks.record import ENVIRONMENTS, ROOT

PINS = ROOT / "benchmarks" / "peers"


def main(peers: Annotated[list[str] | None, typer.Argument(help="by the names of their files")] = None) -> None:
    """Installs what is missing or has other pins than before; a peer that does not install leaves the others alone."""
    failed = [peer for peer in peers or sorted(path.stem for path in PINS.glob("*.txt")) if not _made(peer)]
    for peer in failed:
        print(f"{peer}: does not install; its log: {ENVIRONMENTS / peer}.log", file=sys.stderr)


def _made(peer: str) -> bool:
    pins, home = PINS / f"{peer}.txt", ENVIRONMENTS / peer
    stamp = home / "pins.txt"
    if stamp.exists() and stamp.read_bytes() == pins.read_bytes():
        return True
    home.parent.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    # torch first and by itself: a range that admits a newer one would bring gigabytes of CUDA.
    torch = [line for line in pins.read_text().splitlines() if line.startswith("torch==")]
    with (ENVIRONMENTS / f"{peer}.log").open("w") as log:
        for wanted in ([torch] if torch else []) + [["--requirement", str(pins)]]:
            command = [str(home / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", *wanted]
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
                return False
    stamp.write_bytes(pins.read_bytes())
    return True


if __name__ == "__main__":
    typer.run(main)
