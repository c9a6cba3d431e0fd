"""SGLang Engines, one after the other and each in processes of its own: `python engine.py` takes jobs from standard input, a JSON file
a line, and answers each with the engine's exit status in a line.

A job: {"engine": arguments of sglang.Engine, "environment": variables to set, "rounds": [[input_ids, ...], ...], "tokens": new tokens a
prompt, "watch": a file for `sparse_reference.watch`, or none}. Each round is one batch. Writes {"rounds": [[answer, ...], ...],
"etap": calls, "shared_prefixes": what the last step of each scheduler found to share, if it looked} to the job's file with the suffix
.out, and what the engine prints to the one with .log.

To import SGLang takes ten seconds, and SGLang spawns its processes, so that each of an engine's three does. Without a GPU it is imported
once, here, and all processes are forks of this one. CUDA does not survive a fork: there, engines start as SGLang has it. (The servers of
test_server.py do so everywhere.)
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

LIMIT = 400  # seconds, of one engine


def main() -> None:
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]))
        return
    start = forks() if os.environ.get("ETAP_SGLANG_CPU") == "1" else programs()
    for line in sys.stdin:
        print(start(Path(line.rstrip("\n"))), flush=True)


def run(job_file: Path) -> None:
    import sglang

    job = json.loads(job_file.read_text())
    os.environ.update(job["environment"])
    if "watch" in job:
        import sparse_reference

        sparse_reference.watch(Path(job["watch"]))
    engine = sglang.Engine(**job["engine"])
    try:
        sampling = {"temperature": 0.0, "max_new_tokens": job["tokens"], "ignore_eos": True}
        wanted = {"return_logprob": True, "top_logprobs_num": 2}
        rounds = [engine.generate(input_ids=batch, sampling_params=sampling, **wanted) for batch in job["rounds"]]
        states = engine.get_server_info()["internal_states"]
    finally:
        engine.shutdown()
    calls = [call for state in states for call in state.get("etap", [])]
    shared = [state["etap_shared_prefixes"] for state in states if "etap_shared_prefixes" in state]
    job_file.with_suffix(".out").write_text(json.dumps({"rounds": rounds, "etap": calls, "shared_prefixes": shared}))


def programs() -> Callable[[Path], int]:
    """A function that runs a job in a program of its own."""

    def start(job_file: Path) -> int:
        with job_file.with_suffix(".log").open("wb") as log:
            command = [sys.executable, __file__, str(job_file)]
            return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=LIMIT, check=False).returncode

    return start


def forks() -> Callable[[Path], int]:
    """A function that runs a job in a fork of this process, which has imported SGLang and nothing else: no plugin, no backend."""
    import sglang.srt.entrypoints.engine  # noqa: F401

    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *_, **__: None  # SGLang would set it to spawn

    def start(job_file: Path) -> int:
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status = 1
        try:
            with job_file.with_suffix(".log").open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            signal.alarm(LIMIT)  # which ends this process, and SGLang's end with it
            run(job_file)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    return start


if __name__ == "__main__":
    main()
