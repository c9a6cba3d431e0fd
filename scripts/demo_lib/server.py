"""Runs a real `sglang.launch_server` and talks to it over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import requests

ROOT = Path(__file__).resolve().parents[2]


class ServerFailed(RuntimeError):
    """The server ended, or did not answer in time; the message has the reason that it gave."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_cuda() -> bool:
    """Whether servers here run on a GPU. Asked of a process of its own: this one must not take a CUDA context."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Server:
    """A context manager: starts the server, and leaves none of its processes behind, however the block is left.

    backend  the value of --attention-backend
    device   "cpu" or "cuda"
    log      the file that takes what the server prints
    """

    def __init__(self, model: Path, backend: str, *, device: str, log: Path, options: tuple[str, ...] = ()) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.log = log
        self.command = [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--attention-backend", backend),
            *("--device", device, "--host", "127.0.0.1", "--port", str(port), "--random-seed", "1", *options),
        ]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if device == "cpu":
            self.environment["ETAP_SGLANG_CPU"] = "1"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C reaches this program alone, which then ends the server in order.
            self._process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self, grace: float = 15.0) -> None:
        """End every process of the server: politely, then not."""
        process, self._process = self._process, None
        if process is None:
            return
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            try:
                family = psutil.Process(process.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                family = []
            process.terminate()
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _, alive = psutil.wait_procs(family, timeout=3)
            for child in alive:
                child.kill()
            psutil.wait_procs(alive, timeout=5)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def pid(self) -> int:
        """Of the process whose children are the others."""
        assert self._process is not None
        return self._process.pid

    def wait_until_ready(self, limit: float = 600.0, tick: Callable[[], None] = lambda: None) -> None:
        """Return when the server answers. Calls `tick` a few times a second."""
        assert self._process is not None
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerFailed(f"the server ended with status {self._process.returncode}: {self.reason()}")
            try:
                # Healthy means that a token came out of the model.
                if requests.get(f"{self.url}/health_generate", timeout=5).ok:
                    return
            except requests.RequestException:
                pass
            tick()
            time.sleep(0.2)
        raise ServerFailed(f"the server did not answer within {limit:.0f} s; its log is {self.log}")

    def reason(self) -> str:
        """The last exception in the log, as the server printed it."""
        lines = self.log.read_text(errors="replace").splitlines()
        for line in reversed(lines):
            name, colon, _ = line.partition(": ")
            if colon and name.rsplit(".", 1)[-1].endswith(("Error", "Refusal", "Exception")) and " " not in name:
                return line
        return f"no reason was printed; its log is {self.log}"

    def stream(self, prompt: str, sampling: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """POST /generate: each event has the answer so far (`text`, `output_ids`, `meta_info` with log-probabilities)."""
        body = {
            "text": prompt,
            "sampling_params": sampling,
            "stream": True,
            "return_logprob": True,
            "top_logprobs_num": 2,
        }
        with requests.post(f"{self.url}/generate", json=body, stream=True, timeout=600) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    yield json.loads(line[6:])

    def generate(self, prompt: str, sampling: dict[str, Any]) -> dict[str, Any]:
        """The last event of `stream`."""
        return list(self.stream(prompt, sampling))[-1]

    def etap_calls(self) -> list[dict[str, Any]]:
        """What libetap served so far: {"step", "kernel", "calls"}; empty on a server with another backend."""
        info = requests.get(f"{self.url}/server_info", timeout=60)
        info.raise_for_status()
        return [call for state in info.json()["internal_states"] for call in state.get("etap", [])]
