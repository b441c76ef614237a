"""`python -m benchmarks.arm [BUNDLE]` (or `make arm`): compares next tokens on an emulated ARM processor with ours.

Both compute the same held-out answers after their prompts, with the same release of llama.cpp. They must have the same
likeliest token wherever it is no near tie here. The record is benchmarks/results/arm.json. An emulator says nothing
about speed, so no times are recorded.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from transformers import AutoTokenizer

from benchmarks.arm import emulated
from benchmarks.record import ROOT, Row, SideFailed
from lilliput.artifacts import GGUF, verify
from lilliput.config import Params
from lilliput.data.corpus import read_corpus
from lilliput.devices.divergence import Texts, held_out_answers
from lilliput.errors import LilliputError
from lilliput.params import load_params
from lilliput.statistics.divergence import TokenDivergences
from tasks import layout

SCRIPT = Path(__file__).with_name("next_tokens.py")
FAILED, UNUSABLE = 1, 2  # exit codes

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    bundle: Annotated[Path, typer.Argument(help="folder with model.gguf and its tokenizer")] = layout.BUNDLES
    / "phone-4gb",
    tokens: Annotated[int, typer.Option(help="answer tokens to compare", min=1)] = 60,
) -> None:
    """Checks the inputs, runs both sides, writes the record, and ends non-zero if they differ."""
    try:
        emulated.emulator()
        manifest, params = verify(bundle), load_params(layout.PARAMS)
        texts = _texts(bundle, params, tokens)
        emulated.make()
        clear_nats = params.parity.clear_nats
        row = Row(
            "arm",
            "Next tokens of a bundle on an emulated ARM processor and on this one",
            f"equal wherever the likeliest token leads by {clear_nats:g} nats",
        )
        here, there = both_logits(bundle / GGUF, texts)
    except (LilliputError, SideFailed) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(UNUSABLE) from None
    facts = compare(here, there, [token for _, answer in texts for token in answer], clear_nats)
    row.add(f"aarch64, qemu {emulated.CPU}", **facts)
    met = facts["differing_clear_tokens"] == 0
    row.write(
        f"{facts['same_tokens']} of {facts['tokens']} equal, {facts['differing_clear_tokens']} clear ones differ; "
        f"mean KL divergence {facts['divergence']['kl_mean_nats']['value']:.2g} nats",
        met,
        model={"candidate": manifest.candidate, "sha256": manifest.artifact_sha256, "bundle": bundle.name},
        versions=dict(emulated.versions()),
        note="An emulator says nothing about speed: no times are recorded.",
    )
    if not met:
        raise typer.Exit(FAILED)


def _texts(bundle: Path, params: Params, tokens: int) -> Texts:
    parity = params.parity.model_copy(update={"divergence_tokens": tokens})
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    questions = read_corpus(layout.DATA).questions
    texts = list(held_out_answers(tokenizer, questions, params.model_copy(update={"parity": parity})))
    if not texts:
        raise SideFailed(f"{layout.DATA}: no question has an answer to compare")
    return sorted(texts)  # neighbours share the beginning of their prompts


def both_logits(file: Path, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits that predict the answers on this machine and on the emulated one, (tokens, vocabulary) each.

    Raises:
        SideFailed: one of them failed.
    """
    with tempfile.TemporaryDirectory(prefix="lilliput-arm-") as scratch:
        outputs = []
        for name in (platform.machine(), "emulated"):
            job, out = Path(scratch, f"{name}.json"), Path(scratch, f"{name}.npy")
            job.write_text(json.dumps({"file": str(file.resolve()), "texts": texts, "out": str(out)}), encoding="utf-8")
            typer.echo(f"{name}: {sum(len(answer) for _, answer in texts)} tokens of {len(texts)} answers …")
            _run_here(job) if name != "emulated" else emulated.run(SCRIPT, [job])
            outputs.append(np.load(out))
    return outputs[0], outputs[1]


def _run_here(job: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.arm.next_tokens", str(job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SideFailed(f"next tokens on this machine: {done.stderr.strip()[-600:]}")


def compare(here: np.ndarray, there: np.ndarray, tokens: Sequence[int], clear_nats: float) -> dict[str, Any]:
    """Returns how the emulated machine's logits, shape (tokens, vocabulary), differ from this one's.

    A token is clear if the likeliest one leads the second by `clear_nats` here.
    """
    divergences = TokenDivergences()
    divergences.add(here, there, tokens)
    best_two = np.sort(here, axis=-1)[:, -2:]
    leads = best_two[:, 1] - best_two[:, 0]
    differs, clear = ~np.array(divergences.same_top), leads >= clear_nats
    return {
        "tokens": len(tokens),
        "same_tokens": int((~differs).sum()),
        "clear_tokens": int(clear.sum()),
        "differing_clear_tokens": int((differs & clear).sum()),
        "largest_lead_of_a_difference_nats": float(leads[differs].max()) if differs.any() else None,
        "largest_logit_difference": float(np.abs(here - there).max()),
        "divergence": divergences.record(platform.machine()).as_json(),
    }


if __name__ == "__main__":
    app()
