"""A real server over HTTP, from its start to its end, and the ways in which it may end early."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import requests
import torch
from demo_lib.compare import compare
from demo_lib.server import ROOT, Server, ServerFailed
from harness import SEED

from etap_py import doctor
from etap_py.__main__ import main as etap_command

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}
OPTIONS = ("--mem-fraction-static", "0.3", "--max-total-tokens", "16384", "--enable-fp32-lm-head", "--enable-metrics")
PROMPT = "Return the number of items that were "


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


@pytest.fixture(scope="module")
def refusing(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a cache that libetap can't read."""
    log = tmp_path_factory.mktemp("refusing") / "log"
    with Server(checkpoint, "etap", device=DEVICE, log=log, options=(*OPTIONS, "--kv-cache-dtype", "fp8_e5m2")) as running:
        yield running


@pytest.fixture(scope="module")
def server(checkpoint: Path, refusing: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for this file, which starts beside the refusing one. Leaving it must leave no process."""
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(checkpoint, "etap", device=DEVICE, log=log, options=OPTIONS) as running:
        running.wait_until_ready()
        processes = family(psutil.Process(running.pid))
        assert len(processes) > 2
        yield running
    assert [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []


def test_streams_what_it_answers(server: Server) -> None:
    """Guards the stream: each event continues the one before, and the last is the whole answer."""
    events = list(server.stream(PROMPT, GREEDY))
    assert len(events) > 1
    for earlier, later in pairwise(events):
        assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
    assert events[-1]["meta_info"]["completion_tokens"] == len(events[-1]["output_ids"]) == GREEDY["max_new_tokens"]


def test_many_at_once_sharing_a_prefix(server: Server) -> None:
    """Guards batches and the radix cache: together and from the cache, each prompt gets the answer that it gets alone."""
    prefix = PROMPT * 20
    prompts = [f"{prefix} {word}" for word in ("one", "two", "three", "four", "five", "six")]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: server.generate(prompt, GREEDY), prompts))
    alone = [server.generate(prompt, GREEDY) for prompt in prompts]
    results = [compare(a, b) for a, b in zip(together, alone, strict=True)]
    assert all(result.agrees for result in results), results
    assert all(answer["meta_info"]["cached_tokens"] >= 64 for answer in alone)


def test_openai_endpoints(server: Server) -> None:
    """Guards the two endpoints that most clients use."""
    body = {"model": "default", "temperature": 0.0, "max_tokens": 8}
    completion = requests.post(f"{server.url}/v1/completions", json={**body, "prompt": PROMPT}, timeout=120)
    assert completion.json()["usage"]["completion_tokens"] == 8, completion.text
    chat = {**body, "messages": [{"role": "user", "content": PROMPT}]}
    answer = requests.post(f"{server.url}/v1/chat/completions", json=chat, timeout=120)
    assert answer.json()["usage"]["completion_tokens"] == 8, answer.text


def test_an_aborted_request_harms_nobody(server: Server) -> None:
    """Guards the pool: a client that hangs up in the middle leaves a server that answers as before."""
    before = server.generate(PROMPT, GREEDY)
    stream = server.stream(PROMPT, GREEDY | {"max_new_tokens": 2000})
    next(stream)
    stream.close()
    assert compare(server.generate(PROMPT, GREEDY), before).agrees


def test_a_request_beyond_the_context_is_refused(server: Server) -> None:
    """Guards against a page table that is written past its end: the request is refused, and the server answers as before."""
    before = server.generate(PROMPT, GREEDY)
    body = {"input_ids": [7] * 9000, "sampling_params": GREEDY}  # of 8192
    assert requests.post(f"{server.url}/generate", json=body, timeout=120).status_code == 400
    assert compare(server.generate(PROMPT, GREEDY), before).agrees


def test_floods_leave_memory_as_it_was(server: Server) -> None:
    """Guards against plans, tables and workspaces that pile up, with more requests at once than the pool holds.

    Of one length, and as many floods as it takes: PyTorch keeps compiled kernels for each shape that a matrix product has had, whatever
    the attention, and on a busy machine requests meet in batches of other sizes. What piles up never ends.
    """
    generator = torch.Generator().manual_seed(SEED)

    def flood() -> float:
        """The processes' memory in megabytes after it."""
        prompts = torch.randint(1, 2048, (200, 100), generator=generator).tolist()
        body = {"input_ids": prompts, "sampling_params": GREEDY | {"max_new_tokens": 3}}
        answers = requests.post(f"{server.url}/generate", json=body, timeout=300).json()
        assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [3] * len(prompts)
        return sum(process.memory_info().rss for process in family(psutil.Process(server.pid))) / 1e6

    memory = [flood(), flood()]
    for _ in range(6):
        memory.append(flood())
        if memory[-1] - memory[-3] < 20:
            return
    pytest.fail(f"memory in megabytes after each flood of 200 requests: {[round(m) for m in memory]}")


def test_tells_what_etap_served(server: Server) -> None:
    """Guards the counters on /server_info: a server that fell back to other attention would be silent about it."""
    before = {call["step"]: call["calls"] for call in server.etap_calls()}
    server.generate(PROMPT, GREEDY)
    after = {call["step"]: call["calls"] for call in server.etap_calls()}
    assert after["decode"] - before["decode"] >= (GREEDY["max_new_tokens"] - 1) * 2  # layers


def test_metrics_count_what_etap_served(server: Server) -> None:
    """Guards the counters of /metrics, which an operator's dashboard reads: the same calls as on /server_info."""

    def decode_calls() -> float:
        text = requests.get(f"{server.url}/metrics", timeout=60).text
        lines = [line for line in text.splitlines() if line.startswith("etap:attention_calls_total{") and 'step="decode"' in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    before = decode_calls()
    server.generate(PROMPT, GREEDY)
    assert before > 0
    assert decode_calls() - before >= (GREEDY["max_new_tokens"] - 1) * 2  # layers


def test_the_doctor_asks_a_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards `etap doctor --server`: it shows the server's counters, and says so when nobody answers."""
    served = doctor.examine(server.url).served
    assert {(call.step, call.process) for call in served} >= {("decode", 0), ("extend", 0)}
    etap_command(["doctor", "--server", server.url])
    assert "Served" in capsys.readouterr().out
    with pytest.raises(ConnectionError, match="no SGLang server that answers at http://127.0.0.1:1: "):
        doctor.served_by("http://127.0.0.1:1")


def test_a_killed_scheduler_ends_the_server(server: Server) -> None:
    """Guards against a server that hangs without its worker: requests in flight fail, and every process ends, so that it can be restarted.

    The last test that uses this file's server.
    """
    processes = family(psutil.Process(server.pid))
    scheduler = next(process for process in processes if "scheduler" in " ".join(process.cmdline()))
    stream = server.stream(PROMPT, GREEDY | {"max_new_tokens": 2000})
    next(stream)
    scheduler.kill()
    with pytest.raises(requests.RequestException):
        list(stream)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_refuses_at_start_up(refusing: Server) -> None:
    """Guards the moment of a refusal: the server ends before it serves, and its log ends with the sentence."""
    with pytest.raises(ServerFailed, match="can't read a KV cache of torch.float8_e5m2"):
        refusing.wait_until_ready()


def test_ctrl_c_ends_the_demo_whole(tmp_path: Path) -> None:
    """Guards Ctrl-C in the demo: every process of the server that it had started is gone when it ends."""
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--device", DEVICE, "--folder", str(tmp_path)]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    processes = _wait_for_workers(demo)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, output
    assert "interrupted" in output
    assert [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []


def _wait_for_workers(demo: subprocess.Popen[str]) -> list[psutil.Process]:
    """The demo's processes once its server has started workers of its own."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and demo.poll() is None:
        processes = family(psutil.Process(demo.pid))
        if len(processes) >= 4:  # the demo, the server, a worker and multiprocessing's tracker
            return processes
        time.sleep(0.2)
    raise AssertionError(f"no worker was started: {demo.stdout.read() if demo.poll() is not None else 'timeout'}")
