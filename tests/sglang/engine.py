"""One SGLang Engine in a process of its own: `python engine.py JOB`, where JOB is a JSON file.

JOB: {"engine": arguments of sglang.Engine, "rounds": [[input_ids, ...], ...], "tokens": new tokens a prompt}. Each round is
one batch. Writes {"rounds": [[answer, ...], ...], "etap": calls} to JOB with the suffix .out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(job_file: Path) -> None:
    import sglang

    job = json.loads(job_file.read_text())
    engine = sglang.Engine(**job["engine"])
    try:
        sampling = {"temperature": 0.0, "max_new_tokens": job["tokens"], "ignore_eos": True}
        wanted = {"return_logprob": True, "top_logprobs_num": 2}
        rounds = [engine.generate(input_ids=batch, sampling_params=sampling, **wanted) for batch in job["rounds"]]
        states = engine.get_server_info()["internal_states"]
    finally:
        engine.shutdown()
    calls = [call for state in states for call in state.get("etap", [])]
    job_file.with_suffix(".out").write_text(json.dumps({"rounds": rounds, "etap": calls}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
