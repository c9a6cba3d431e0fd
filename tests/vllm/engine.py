"""A vLLM engine in a process of its own: python engine.py '{"model": FOLDER, ...arguments of vllm.LLM}' OUTPUT. Writes one JSON object.

answers: for each prompt {"output_ids", "meta_info"} as demo_lib.compare reads it
steps: what libetap computed, as [sequences, query tokens, most query tokens of a sequence, calls]
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PROMPTS = [[5, 7, 11, 13, 17, 19, 23, 29], [31] * 40, list(range(40, 140)), [3, 4] * 30, [3, 1]]
TOKENS = 24


def generate(engine: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=2, ignore_eos=True)
    requests = engine.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    answers = []
    for request in requests:
        output = request.outputs[0]
        chosen = [[step[token].logprob, token] for token, step in zip(output.token_ids, output.logprobs, strict=True)]
        best = [sorted(([one.logprob, token] for token, one in step.items()), reverse=True) for step in output.logprobs]
        answers.append({"output_ids": list(output.token_ids), "meta_info": {"output_token_logprobs": chosen, "output_top_logprobs": best}})
    return answers


def main() -> None:
    from vllm import LLM

    steps: Counter[tuple[int, int, int]] = Counter()
    if os.environ.get("ETAP_VLLM_CPU") == "1":
        from etap_vllm import decode

        attend = decode.attend

        def counted(plan: Any, *arguments: Any, **named: Any) -> Any:
            steps[plan.problem.batch, plan.problem.rows, plan.problem.max_query_len] += 1
            return attend(plan, *arguments, **named)

        decode.attend = counted
    engine = LLM(enforce_eager=True, max_model_len=512, max_num_seqs=8, seed=0, **json.loads(sys.argv[1]))
    result = {"answers": generate(engine), "steps": [[*shape, calls] for shape, calls in sorted(steps.items())]}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
