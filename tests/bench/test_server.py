"""A whole server: models by name, what one card of one attention group computes, and sparse attention."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import pytest
from etap_bench import presets, results, runner, work, workload
from etap_bench.errors import Refused

from etap_py.__main__ import main


def trace_of(folder: Path, requests: list[dict[str, object]]) -> str:
    path = folder / "t.jsonl"
    path.write_text("\n".join(json.dumps(request) for request in requests))
    return str(path)


# ---- Models by name ----


def test_presets_have_sources() -> None:
    """A number without a source can't be checked, and a name of two models means either."""
    called: dict[str, str] = {}
    for known, preset in presets.packaged().items():
        assert {"heads", "layers", "d_latent", "d_rope"} <= preset.sources.keys()
        for name in {known, preset.title, *preset.names}:
            assert presets.name_of(name) == known
            assert called.setdefault(name, known) == known
    with pytest.raises(msgspec.ValidationError, match="sources has no entry for layers"):
        msgspec.convert(
            {**msgspec.to_builtins(presets.load("kimi-k2")), "sources": {"heads": "", "d_latent": "", "d_rope": ""}}, presets.Preset
        )


def test_names_of_models() -> None:
    """In the spelling of whoever writes it."""
    for name in ("DeepSeek-R1", "deepseek_v3.1", "DEEPSEEK V3"):
        assert presets.name_of(name) == "deepseek-v3"
    with pytest.raises(Refused, match="model is 'gpt-2'; allowed: deepseek-v2-lite, .*mistral-large-3"):
        presets.load("gpt-2")


@pytest.mark.parametrize(
    ("model", "tp", "dp", "heads", "layers"),
    [
        ("deepseek-v3", 8, 1, 16, 61),
        ("deepseek-v3.2", 16, 2, 16, 61),
        ("kimi-k2", 16, 16, 64, 61),
        ("kimi-k3", 8, 1, 12, 24),
        ("glm-5", 8, 4, 32, 78),
        ("glm-4.7-flash", 8, 1, 3, 47),
        ("deepseek-v2-lite", 1, 1, 16, 27),
    ],
)
def test_heads_of_a_card(model: str, tp: int, dp: int, heads: int, layers: int) -> None:
    """By hand, and in place of the shipped workload's own."""
    chosen = workload.load("chat", [f"server.preset={model}", f"server.tp={tp}", f"server.dp={dp}"])
    assert (chosen.model.heads, chosen.model.layers) == (heads, layers)
    assert chosen.served == f"{model}, tp {tp}, dp {dp}, {heads} heads a card"


def test_cards_hold_all_heads(seed: int) -> None:
    """Together at least the model's, and with one fewer each they would lack some."""
    rng = random.Random(seed)
    for _ in range(50):
        preset = rng.choice(list(presets.packaged().values()))
        cards = rng.randint(1, preset.heads)
        heads = preset.of_card(cards)["heads"]
        assert heads * cards >= preset.heads > (heads - 1) * cards
        with pytest.raises(Refused, match=f"tp / dp is {preset.heads + cards}; allowed: 1 to {preset.heads}"):
            preset.of_card(preset.heads + cards)


def test_what_wins(tmp_path: Path, seed: int) -> None:
    """Settings over a model that settings name, wherever they stand; that over the file's fields; the file's over a model of its own."""
    rng = random.Random(seed)
    settings = ["server.preset=kimi-k2", "server.tp=4", "model.heads=5", "scheduler.max_batch=3"]
    rng.shuffle(settings)
    chosen = workload.load("chat", settings)
    assert (chosen.model.heads, chosen.model.layers, chosen.scheduler.max_batch) == (5, 61, 3)

    file = tmp_path / "mine.toml"
    requests = "[[requests]]\ncount = 9\nprompt = { median = 100 }\nanswer = { median = 5 }\n"
    file.write_text(f'[server]\npreset = "Kimi-K2"\ntp = 16\ndp = 8\n[model]\nkv_format = "e4m3"\n{requests}')
    own = workload.load(str(file))
    assert (own.server.preset, own.server.tp, own.model.heads, own.model.kv_format) == ("kimi-k2", 16, 32, "e4m3")
    assert workload.load(str(file), ["server.tp=8"]).model.heads == 64
    other = workload.load(str(file), ["server.preset=glm-5", "server.dp=1"])
    assert (other.model.heads, other.model.kv_format, other.model.topk) == (4, "e4m3_656", 2048)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat", "--model", "gpt-2"], "model is 'gpt-2'; allowed: deepseek-v2-lite, "),
        (["chat", "--model", "kimi-k2", "--tp", "8", "--dp", "3"], "dp is 3; allowed: divisors of tp, which is 8"),
        (["chat", "--model", "deepseek-v2-lite", "--tp", "32"], "tp / dp is 32; allowed: 1 to 16, the heads of DeepSeek-V2-Lite"),
        (["chat", "--tp", "8"], "setting is 'server.tp=8' without a model; allowed: with one (--model)"),
        (["bf16-1x1K-h16", "--model", "kimi-k2"], "setting is 'server.preset=kimi-k2'; allowed: with a workload only"),
        (["quick", "--dp", "2"], "setting is 'server.dp=2'; allowed: with a workload only"),
        (["chat", "--set", "server=3"], "Expected `object`, got `int` - at `$.server`"),
    ],
)
def test_bad_server(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence; a model with shapes was measured as if it were not there."""
    assert main(["bench", *arguments, "--list"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


# ---- Attention groups ----


def test_a_group_gets_its_share(tmp_path: Path, seed: int) -> None:
    """Every dp-th request in order of arrival, and of those every one; the batch and the cache are the group's, not shared out."""
    rng = random.Random(seed)
    for _ in range(20):
        dp, count = rng.choice([1, 2, 4, 8]), rng.randint(1, 60)
        arrivals = sorted(rng.uniform(0, 9) for _ in range(count))
        lines: list[dict[str, object]]
        lines = [{"arrival": second, "prompt_tokens": 1000 * (i + 1), "answer_tokens": 1} for i, second in enumerate(arrivals)]
        rng.shuffle(lines)
        settings = ["steps=1000", "server.preset=kimi-k2", f"server.tp={dp}", f"server.dp={dp}", "scheduler.max_batch=3"]
        decoded = work.of_workload(workload.load(trace_of(tmp_path, lines), settings))
        seen = sorted(length // 1000 - 1 for item in decoded.items for length in item.shape.lengths)
        assert seen == list(range(0, count, dp))
        assert f"{count} request" in decoded.note
        assert ("attention groups" in decoded.note) == (dp > 1)


def test_list_names_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "chat", "--list", "--steps", "2", "--model", "DeepSeek-R1", "--tp", "16", "--dp", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0].endswith(" decode steps, deepseek-v3, tp 16, dp 2, 16 heads a card")
    assert "one of 2 attention groups" in said.err


# ---- Sparse attention ----


def test_what_a_sparse_kernel_is_given(tmp_path: Path, seed: int) -> None:
    """Query token by query token, against a loop over the same steps without selection: as many tokens as it sees, at most topk, in lists
    as wide as topk. A shrunk workload selects in proportion, or short contexts would make it dense."""
    rng = random.Random(seed)
    for _ in range(20):
        topk, shrink = rng.choice([1, 64, 512]), rng.choice([1, 4])
        lines: list[dict[str, object]] = []
        for i in range(rng.randint(1, 12)):
            prefix = {"prefix_id": "p", "prefix_tokens": 64, "speculative_tokens": rng.randint(0, 3)}
            lines.append({"arrival": i * 0.02, "prompt_tokens": rng.randint(64, 900), "answer_tokens": rng.randint(1, 9), **prefix})
        settings = ["steps=50", f"shrink={shrink}"]
        path = trace_of(tmp_path, lines)
        dense = work.of_workload(workload.load(path, settings))
        sparse = work.of_workload(workload.load(path, [*settings, f"model.topk={topk}"]))
        most = max(1, topk // shrink)
        for before, after in zip(dense.items, sparse.items, strict=True):
            expected = []
            for length, count in zip(before.shape.lengths, before.shape.query_lens, strict=True):
                expected += [min(most, length - count + 1 + token) for token in range(count)]
            assert after.shape.lengths == tuple(expected)
            assert set(after.shape.query_lens) == {1}
            assert (after.shape.sparse, after.shape.context, after.shape.shared) == (True, most, ())
            assert after.shape.distinct_kv_bytes == sum(expected) * after.shape.token_bytes
            assert after.step == before.step
        assert "choice by the indexer is not in the time" in sparse.note
        assert "indexer" not in dense.note


def test_a_sparse_server_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end on the CPU: the results are right, the file says what was resolved, and a row's command gives its shape again."""
    monkeypatch.setattr(runner, "_HOST_CACHE", 1 << 20)
    path = tmp_path / "run.json"
    few = ["--steps", "2", "--shrink", "32", "--rounds", "1", "--device", "cpu"]
    assert main(["bench", "agents", "--model", "DeepSeek-V3.2", "--tp", "16", "--dp", "2", *few, "-o", str(path)]) == 0
    read = results.read(path)
    assert read.run.workload is not None
    model, server = read.run.workload.model, read.run.workload.server
    assert (server.preset, server.tp, server.dp) == ("deepseek-v3.2", 16, 2)
    assert (model.heads, model.layers, model.topk, model.kv_format) == (16, 61, 2048, "e4m3_656")
    row = read.rows[-1]
    assert row.wrong == {} and row.measured.us["etap"] > 0
    assert (row.shape.heads, row.shape.sparse, max(row.shape.lengths)) == (16, True, 64)
    capsys.readouterr()
    assert main([*row.command.split()[1:], "--rounds", "1", "--json"]) == 0
    assert tuple(json.loads(capsys.readouterr().out)["shape"]["lengths"]) == row.shape.lengths
