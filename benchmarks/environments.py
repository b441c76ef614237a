"""Creates a virtual environment for each peer, `.bench/<peer>/`, from benchmarks/peers/<peer>.txt.

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


def main(peers: Annotated[list[str] | None, typer.Argument(help="names of their files; default: all")] = None) -> None:
    """Installs environments that are missing or have changed pins; a failing peer does not stop the others."""
    failed = [peer for peer in peers or sorted(path.stem for path in PINS.glob("*.txt")) if not _install(peer)]
    for peer in failed:
        print(f"{peer}: installation failed; log: {ENVIRONMENTS / peer}.log", file=sys.stderr)


def _install(peer: str) -> bool:
    pins, home = PINS / f"{peer}.txt", ENVIRONMENTS / peer
    stamp = home / "pins.txt"
    if stamp.exists() and stamp.read_bytes() == pins.read_bytes():
        return True
    home.parent.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    # torch separately and first: a range that allows a newer version would install gigabytes of CUDA.
    torch = [line for line in pins.read_text().splitlines() if line.startswith("torch==")]
    with (ENVIRONMENTS / f"{peer}.log").open("w") as log:
        for requirements in ([torch] if torch else []) + [["--requirement", str(pins)]]:
            command = [str(home / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", *requirements]
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
                return False
    stamp.write_bytes(pins.read_bytes())
    return True


if __name__ == "__main__":
    typer.run(main)
