import json, os, pathlib, subprocess, sys, concurrent.futures as c
R = pathlib.Path.cwd()
sys.path[:0] = [str(R / "tests/sglang"), str(R / "tests"), str(R / "scripts")]
os.environ.setdefault("SGLANG_FP8_PAGED_MQA_LOGITS_TORCH", "1")
import test_gpu_sparse_engine as t
from demo_lib.checkpoint import write_random
folder = pathlib.Path("/tmp/sparse"); folder.mkdir(exist_ok=True)
write_random(folder / "checkpoint", t.CONFIG)
small = {"cuda_graph_max_bs_decode": 8, "cuda_graph_backend_prefill": "disabled", "max_total_tokens": 16384, "kv_cache_dtype": "bfloat16"}
B = {"CUDA_LAUNCH_BLOCKING": "1"}
jobs = {
    "native MTP": ({"attention_backend": "dsa", "dsa_decode_backend": "flashmla_sparse", **t.MTP}, {}),
    "etap MTP": ({"attention_backend": "etap", **t.MTP}, {}),
    "etap MTP eager": ({"attention_backend": "etap", "disable_cuda_graph": True, **t.MTP}, B),
}
def run(item):
    name, (options, environment) = item
    f = folder / (name.replace(" ", "-") + ".json")
    engine = t.arguments(model_path=str(folder / "checkpoint"), device="cuda", **small, **options)
    f.write_text(json.dumps({"engine": engine, "environment": {**t.ENVIRONMENT, **environment}, "rounds": t.prompts(t.PROMPTS), "tokens": t.NEW_TOKENS}))
    env = os.environ | {"PYTHONPATH": f"{R}:" + os.environ["PYTHONPATH"], **environment}
    log = f.with_suffix(".txt")
    try:
        rc = subprocess.run([sys.executable, str(R / "tests/sglang/engine.py"), str(f)], env=env, stdout=log.open("w"), stderr=subprocess.STDOUT, timeout=int(sys.argv[1])).returncode
    except subprocess.TimeoutExpired:
        rc = "timeout"
    return name, rc, log.read_text().splitlines()
out = pathlib.Path(os.environ["OUT"])
with c.ThreadPoolExecutor(3) as pool:
    for name, rc, lines in pool.map(run, jobs.items()):
        (out / f"mtp-{name.replace(' ', '-')}.log").write_text("\n".join(lines)[-400000:])
        print("==", name, "rc", rc)
        bad = [i for i, l in enumerate(lines) if "Traceback" in l]
        for l in lines[bad[0]:bad[0] + 60] if bad else lines[-3:]:
            if any(w in l for w in ("Error", "etap_sglang", "eagle", "dsa", "Assert")): print("   ", l[:180])
