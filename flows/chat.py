"""Chats in the terminal with the model that a device's gateway serves; starts the gateway if none runs."""

from __future__ import annotations

import http.client
import json
import os
import sys
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.deploy import DEPLOYMENTS, RUN_NAME, deploy, folder_of, running
from flows.engine.launch import launch
from flows.engine.output import fail, guarded_output
from flows.engine.stopping import rejected_input
from lilliput.errors import ArtifactError, ConfigError
from lilliput.params import load_params

ANSWER_S = 300.0
_FIRST_ERROR = 400  # HTTP status
_COUNTERS = ("nvml_counter", "rapl", "soc", "battery")  # other sources estimate
_PLACES = {"device": "the device", "server": "the edge server", "cache": "the answer cache"}

Message = Mapping[str, str]


def device_of(params_file: Path, device: str | None) -> str:
    """Returns `device`; without one, the device whose gateway runs, or the first under `serving`.

    Raises:
        ConfigError: the parameters serve no device, or not this one.
    """
    folder = folder_of(params_file)
    known = list(load_params(folder / "params.yaml").serving)
    if not known:
        raise ConfigError("serving: empty; add the device to chat with (docs/configuration.md)")
    if device and device not in known:
        raise ConfigError(f"serving: no settings for {device}; params.yaml has under serving: {', '.join(known)}")
    return device or next((name for name in known if running(folder / DEPLOYMENTS / name)), known[0])


def ensure_served(device: str, params_file: Path) -> str:
    """Returns the address of the gateway of `device`; deploys its champion at a free port if none runs."""
    home = folder_of(params_file) / DEPLOYMENTS / device
    if not running(home):
        message = launch(
            deploy,
            *(device, "champion", "127.0.0.1", 0, str(params_file), None),
            run_name=RUN_NAME,
            stop_message="stopped; nothing is half-written",
        )
        print(f"{message}; it keeps running until `lilliput serve {device} --stop`", file=sys.stderr)
    gateway = running(home)
    if not gateway:
        raise ArtifactError(f"{device}: the gateway has just ended; see {home / 'gateway.log'}")
    return gateway["url"]


def ask(url: str, messages: list[Message]) -> Iterator[str | dict[str, Any]]:
    """Yields the answer's text in parts as they arrive, then where it came from and what it cost.

    Raises:
        ArtifactError: the gateway does not answer, or answers with an error.
    """
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=ANSWER_S)
    body = json.dumps({"messages": messages, "stream": True})
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json", **_bearer()})
        response = connection.getresponse()
        if response.status >= _FIRST_ERROR:
            raise ArtifactError(f"{url}: {_message_of(response.read(), response.status)}")
        yield from _parts(response, url)
    except (OSError, http.client.HTTPException) as error:
        raise ArtifactError(f"{url}: the gateway does not answer ({type(error).__name__}); start it again") from None
    finally:
        connection.close()


def _parts(lines: Iterable[bytes], url: str) -> Iterator[str | dict[str, Any]]:
    for line in lines:
        if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise ArtifactError(f"{url}: {_message_of(data, 0)}")
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                yield text
        if origin := chunk.get("lilliput"):
            yield origin


def _bearer() -> dict[str, str]:
    token = os.environ.get("LILLIPUT_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _message_of(answer: bytes, status: int) -> str:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {status}"


def describe(origin: Mapping[str, Any]) -> str:
    """Returns where an answer came from, in one line."""
    place = _PLACES.get(origin["place"], origin["place"])
    energy = origin.get("energy_j")
    estimated = "" if origin.get("energy_source") in _COUNTERS else "~"
    cost = f" · {estimated}{energy:.2g} J on the device" if energy is not None else ""
    seconds = f" · {origin['seconds']:.1f} s" if "seconds" in origin else ""
    return f"from {place}{seconds}{cost} ({origin['reason']})"


def converse(url: str, device: str) -> None:
    """Reads questions from the terminal and prints answers until the input ends."""
    print(f"{device} at {url}. An empty line starts anew; Ctrl-D ends.", file=sys.stderr)
    messages: list[Message] = []
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if not question:
            messages = []
            continue
        try:
            answer, _ = _print_answer(url, [*messages, {"role": "user", "content": question}])
        except ArtifactError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _print_answer(url: str, messages: list[Message], *, quiet: bool = False) -> tuple[str, dict[str, Any]]:
    text, origin = "", {}
    for part in ask(url, messages):
        if isinstance(part, dict):
            origin = part
        else:
            text += part
            if not quiet:
                print(part, end="", flush=True)
    if not quiet:
        print()
        if origin:
            typer.secho(describe(origin), dim=True, err=True)
    return text, origin


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    epilog="Examples:  python -m flows.chat  ·  … phone-4gb  ·  … --message 'What is the capital of Peru?' --json"
)
def main(
    device: Annotated[
        str | None, typer.Argument(help="under `serving` in params.yaml; default: the one that is served, or the first")
    ] = None,
    message: Annotated[str | None, typer.Option(help="ask only this")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="with --message: answer and origin as JSON")] = False,
    params: Annotated[Path, typer.Option(help="another file means the champion of its workspace")] = Path(
        "params.yaml"
    ),
) -> None:
    """Chat with DEVICE's champion; starts its gateway if none runs, and prints where each answer came from."""
    if as_json and not message:
        fail("--json needs --message", 2)
    with rejected_input():
        chosen = device_of(params, device)
        url = ensure_served(chosen, params)
        if not message:
            return converse(url, chosen)
        text, origin = _print_answer(url, [{"role": "user", "content": message}], quiet=as_json)
    if as_json:
        print(json.dumps({"device": chosen, "answer": text, "origin": origin}, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    with guarded_output():
        app()
