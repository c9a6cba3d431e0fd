"""Reading traces and workload files, and what is said about those that can't be used."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from etap_bench import workload
from etap_bench.errors import Refused
from etap_bench.inputs import Arena, Inputs
from etap_bench.shape import Shape
from etap_bench.traces import Request, load_trace

from etap_py.__main__ import main


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def read_trace(path: Path) -> list[Request]:
    return load_trace(str(path)).requests


def test_ours(tmp_path: Path, seed: int) -> None:
    """Requests come in order of arrival, from 0 s on, and keep what they share; those without an answer are left out."""
    rng = random.Random(seed)
    lines = [
        {"arrival": rng.uniform(5, 50), "prompt_tokens": rng.randint(100, 9999), "answer_tokens": rng.randint(1, 99)} for _ in range(20)
    ]
    lines[3] |= {"prefix_id": "tools", "prefix_tokens": 90, "speculative_tokens": 3}
    text = "\n".join(json.dumps(line) for line in [*lines, {"arrival": 1, "prompt_tokens": 5, "answer_tokens": 0}]) + "\n\n"
    requests = read_trace(written(tmp_path, "t.jsonl", text))
    in_order = sorted(lines, key=lambda line: line["arrival"])
    assert [(r.prompt_tokens, r.answer_tokens) for r in requests] == [(x["prompt_tokens"], x["answer_tokens"]) for x in in_order]
    assert requests[0].arrival == 0
    assert requests[-1].arrival == pytest.approx(in_order[-1]["arrival"] - in_order[0]["arrival"])
    (sharing,) = (r for r in requests if r.blocks)
    assert sharing.blocks == (("tools", 90),)
    assert sharing.speculative_tokens == 3


def test_mooncake(tmp_path: Path) -> None:
    """Milliseconds, and blocks of 512 tokens of which a last, incomplete one is not shared."""
    text = (
        '{"timestamp": 3000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 4, 5]}\n'
        '{"timestamp": 4500, "input_length": 512, "output_length": 2, "hash_ids": [0]}\n'
    )
    first, second = read_trace(written(tmp_path, "t.jsonl", text))
    assert (first.arrival, second.arrival) == (0, 1.5)
    assert first.blocks == ((0, 512), (4, 512))
    assert second.blocks == ((0, 512),)


def test_blocks_of_a_format_without_them(tmp_path: Path) -> None:
    """The setting was accepted, and nothing came of it."""
    path = written(tmp_path, "t.jsonl", '{"arrival": 0, "prompt_tokens": 40, "answer_tokens": 1}\n')
    with pytest.raises(Refused, match="trace_block_tokens is 16, but this format's prompts are not in blocks"):
        workload.load(str(path), ["trace_block_tokens=16"]).read()


def test_more_draft_tokens_than_a_kernel_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They ended in a ValueError about query_len, which nobody gave, without the line or the workload, and exit status 1."""
    line = '{"arrival": 0, "prompt_tokens": 40, "answer_tokens": 1, "speculative_tokens": 40000}'
    trace = written(tmp_path, "t.jsonl", line)
    assert main(["bench", str(trace), "--list"]) == 2
    assert f"line 1 of trace {trace} can't be used ({line}): expected `int` <= 32766 - at `$.speculative_tokens`" in capsys.readouterr().err
    drawn = written(tmp_path, "w.toml", "requests = [{count=1, prompt={median=9}, answer={median=1}, speculative_tokens=40000}]")
    assert main(["bench", str(drawn), "--list"]) == 2
    assert "decode step 0 of workload w can't be computed: query_len is 40001; allowed: 1 to 32767\n" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["-", "t.csv", "t.jsonl"])
def test_an_empty_trace(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of standard input without a byte it was said that it has the fields "(none)"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    written(tmp_path, "t.csv", "")
    written(tmp_path, "t.jsonl", "\n")
    name = "from standard input" if source == "-" else source
    with pytest.raises(Refused, match=f"trace {name} is empty; allowed: one request or more"):
        load_trace(source)


def test_azure(tmp_path: Path) -> None:
    """Dates with seven decimals (2023) and with a time zone (2024)."""
    old = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:04.4799600,396,109\n"
    new = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,374,44\n2024-05-10 00:00:00.509930+00:00,396,109\n"
    for text in (old, new):
        first, second = read_trace(written(tmp_path, "t.csv", text))
        assert (first.prompt_tokens, first.answer_tokens, second.answer_tokens) == (374, 44, 109)
        assert second.arrival == pytest.approx(0.5, abs=1e-6)


def test_burstgpt(tmp_path: Path) -> None:
    """A failed request, which has no answer, is left out."""
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,log\n45,GPT-4,87,0,87,log\n"
    (only,) = read_trace(written(tmp_path, "t.csv", text))
    assert (only.arrival, only.prompt_tokens, only.answer_tokens) == (0, 472, 18)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.jsonl", '{"arrival": 0, "prompt_tokens": 5}', "line 1 of trace .*missing required field `answer_tokens`"),
        ("t.jsonl", '{"arrival": 0, "prompt_tokens": -5, "answer_tokens": 1}', "line 1 .*-5.*expected `int` >= 0 .*prompt_tokens"),
        ("t.jsonl", '{"arrival": 0, "prompt_tokens": 5, "answer_tokens": 1}\n{"arrival": 1', "line 2 of trace"),
        ("t.jsonl", '{"arrival": 0, "prompt_tokens": 5, "answer_tokens": 1, "prefix_tokens": 6}', "prefix_tokens is 6; allowed: 0 to 5"),
        ("t.jsonl", '{"arrival": 0, "prompt_tokens": 5, "answer_tokens": 1, "colour": 6}', "unknown field `colour`"),
        ("t.jsonl", '{"begin": 0}', "has the fields begin; allowed: a format with 'arrival' or 'timestamp'"),
        ("t.jsonl", "[1, 2]", "line 1 of trace"),
        ("t.jsonl", "", "is empty; allowed: one request or more"),
        ("t.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:17:03,5\n", "line 2 of trace .*GeneratedTokens"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,5,5\n", "line 2 of trace .*noon"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,5,-5\n", "line 2 of trace .*-5"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,5,5,9\n", "line 2 of trace"),
        ("t.csv", "a,b\n1,2\n", "allowed: a format with 'TIMESTAMP' or 'Timestamp'"),
        ("t.parquet", "", "ends in '.parquet'; allowed: .jsonl or .csv"),
    ],
)
def test_bad_trace(tmp_path: Path, name: str, text: str, words: str) -> None:
    """One sentence, which names the line."""
    with pytest.raises(Refused, match=words) as refused:
        read_trace(written(tmp_path, name, text))
    assert "\n" not in str(refused.value)


# ---- Requests that failed ----

ROWS = {
    "ours.jsonl": ('{{"arrival": {0}, "prompt_tokens": {1}, "answer_tokens": {2}}}', ""),
    "mooncake.jsonl": ('{{"timestamp": {0}e3, "input_length": {1}, "output_length": {2}, "hash_ids": []}}', ""),
    "bailian.jsonl": ('{{"chat_id": 1, "timestamp": {0}, "input_length": {1}, "output_length": {2}, "hash_ids": [], "type": "text"}}', ""),
    "azure.csv": ("2024-05-10 00:00:{0:02}.000000+00:00,{1},{2}", "TIMESTAMP,ContextTokens,GeneratedTokens"),
    "multimodal.csv": ("2024-10-15 00:00:{0:02}.5,3,{1},{2}", "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens"),
    "burstgpt.csv": ("{0},ChatGPT,{1},{2},9,API log", "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"),
    "burstgpt2.csv": (
        "{0}.0,,1.5,GPT-4,{1},{2},9,API log",
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
    ),
}


def rows_of(name: str, counts: list[tuple[object, object]]) -> str:
    """A trace in which request i arrives at i seconds."""
    row, header = ROWS[name]
    lines = [row.format(second, prompt, answer) for second, (prompt, answer) in enumerate(counts)]
    return "\n".join([header, *lines] if header else lines) + "\n"


@pytest.mark.parametrize("name", ROWS)
def test_failed_requests_are_counted_and_left_out(name: str, tmp_path: Path, seed: int) -> None:
    """One row with 0 prompt tokens refused a whole BurstGPT or Azure file, and theirs contain failures."""
    rng = random.Random(seed)
    counts = [(rng.choice([0, 7, 99]), rng.choice([0, 5, 88])) for _ in range(30)] + [(3, 4), (0, 0), (0, 9), (8, 0)]
    kept = [(second, pair) for second, pair in enumerate(counts) if all(pair)]
    trace = load_trace(str(written(tmp_path, name, rows_of(name, counts))))
    assert [(r.prompt_tokens, r.answer_tokens) for r in trace.requests] == [pair for _, pair in kept]
    assert [r.arrival for r in trace.requests] == pytest.approx([second - kept[0][0] for second, _ in kept])
    without_prompt = sum(not prompt for prompt, _ in counts)
    without_answer = sum(bool(prompt) and not answer for prompt, answer in counts)
    assert trace.left_out == {"without prompt tokens": without_prompt, "without answer tokens": without_answer}
    assert f"{len(kept)} requests in " in trace.note
    assert f"left out: {without_prompt} without prompt tokens" in trace.note


@pytest.mark.parametrize("name", [name for name in ROWS if name != "ours.jsonl"])
def test_missing_counts_are_failures(name: str, tmp_path: Path) -> None:
    """What a program writes for a number that is missing; and the whole numbers of a column that has gaps."""
    nothing = "null" if name.endswith(".jsonl") else ""
    trace = load_trace(str(written(tmp_path, name, rows_of(name, [("472.0", "18.0"), (nothing, 5), (5, nothing)]))))
    assert [(r.prompt_tokens, r.answer_tokens) for r in trace.requests] == [(472, 18)]
    assert sum(trace.left_out.values()) == 2


@pytest.mark.parametrize("name", ROWS)
def test_a_trace_of_failures_only(name: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"holds no request with an answer \(2 are without prompt tokens\)"):
        read_trace(written(tmp_path, name, rows_of(name, [(0, 5), (0, 0)])))


# ---- Units ----


def test_bailian(tmp_path: Path) -> None:
    """Mooncake's field names with seconds and blocks of 16 tokens: taken for Mooncake's, it was 1000 times too dense. Its blocks are
    named by their content: one that follows another prefix, or is repeated, is not the same."""

    def line(second: float, tokens: int, ids: list[int]) -> str:
        turn = {"chat_id": 159, "parent_chat_id": -1, "type": "text", "turn": 1}
        return json.dumps({**turn, "timestamp": second, "input_length": tokens, "output_length": 9, "hash_ids": ids})

    lines = [line(61.114, 53, [5, 6, 7, 8]), line(62.614, 48, [5, 6, 9]), line(63.0, 48, [4, 6, 7]), line(64.0, 48, [3, 3, 3])]
    trace = load_trace(str(written(tmp_path, "qwen_traceA_blksz_16.jsonl", "\n".join(lines))))
    assert "Bailian (times in s, blocks of 16 tokens), 4 requests in 2.9 s" in trace.note
    first, second, third, fourth = trace.requests
    assert [r.arrival for r in trace.requests] == pytest.approx([0, 1.5, 1.886, 2.886])
    assert first.blocks == ((5, 16), (6, 16), (7, 16))
    assert second.blocks[:2] == first.blocks[:2]
    assert not set(third.blocks) & set(first.blocks)
    assert len(set(fourth.blocks)) == 3
    assert {tokens for request in trace.requests for _, tokens in request.blocks} == {16}


def test_units_can_be_given(tmp_path: Path) -> None:
    """Where a trace has Mooncake's fields and other units; they are part of the run."""
    text = '{"timestamp": 0.5, "input_length": 40, "output_length": 7, "hash_ids": [1, 2, 3]}\n'
    text += '{"timestamp": 2.75, "input_length": 32, "output_length": 7, "hash_ids": [1, 2]}\n'
    path = str(written(tmp_path, "t.jsonl", text))
    with pytest.raises(Refused, match=r"timestamp is 0.5, and Mooncake's are whole milliseconds; .*--set trace_time_unit=s"):
        workload.load(path).all_requests()
    with pytest.raises(Refused, match=r"hash_ids has 3 entries for 40 tokens, .*--set trace_block_tokens=16"):
        workload.load(path, ["trace_time_unit=s"]).all_requests()
    for unit, factor in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        chosen = workload.load(path, [f"trace_time_unit={unit}", "trace_block_tokens=16"])
        first, second = chosen.all_requests()
        assert second.arrival == pytest.approx(2.25 * factor)
        assert first.blocks == ((1, 16), (2, 16))
        assert second.blocks == first.blocks
    with pytest.raises(Refused, match="trace_time_unit is 'h'; allowed: s, ms, us, ns"):
        workload.load(path, ["trace_time_unit=h"])
    dates = str(written(tmp_path, "azure.csv", rows_of("azure.csv", [(5, 5)])))
    with pytest.raises(Refused, match="trace_time_unit is 'ms', but this format's times are dates"):
        workload.load(dates, ["trace_time_unit=ms"]).all_requests()


def test_small_blocks_share_pages(seed: int) -> None:
    """Blocks of 16 tokens share pages of 64: before, only blocks of a page or more did. Against tokens, one by one."""
    rng = random.Random(seed)
    arena = Arena("bf16", 256, 64, 4 * (20 * 512 + 300 + 256), "cpu")
    for _ in range(30):
        page_size, size = rng.choice([1, 16, 64, 256]), rng.choice([1, 16, 48, 100, 512])
        depth = [rng.randint(0, 20) for _ in range(4)]  # blocks that each sequence has in common with the longest
        shared = tuple(tuple((f"block {i}", size) for i in range(count)) for count in depth)
        lengths = tuple(count * size + rng.randint(1, 300) for count in depth)
        shape = Shape(lengths, heads=1, page_size=page_size, d_latent=256, shared=shared)
        sequences = [[page for page in pages if page >= 0] for pages in Inputs(shape, arena, pools=1).block_tables[0].tolist()]
        for i, first in enumerate(sequences):
            assert len(first) == -(-lengths[i] // page_size)
            for j, second in enumerate(sequences[:i]):
                common = min(depth[i], depth[j]) * size // page_size
                assert set(first) & set(second) == set(first[:common])
                assert first[:common] == second[:common]
        distinct = sum(lengths) - sum(d * size // page_size for d in depth) * page_size + max(depth) * size // page_size * page_size
        assert shape.distinct_kv_bytes == distinct * shape.token_bytes


# ---- Parts of a trace ----


def random_trace(rng: random.Random, folder: Path) -> str:
    """In no order, with arrivals that are equal, requests that failed, and prompts by which each can be told."""
    seconds = [rng.choice([rng.uniform(3, 99), 7.0]) for _ in range(rng.randint(1, 40))]
    lines = [{"arrival": second, "prompt_tokens": 10 + i, "answer_tokens": 3} for i, second in enumerate(seconds)]
    lines += [{"arrival": 1.0, "prompt_tokens": 9, "answer_tokens": 0}] * rng.randint(0, 3)
    rng.shuffle(lines)
    return str(written(folder, "t.jsonl", "\n".join(json.dumps(line) for line in lines)))


def test_parts_of_a_trace(tmp_path: Path, seed: int) -> None:
    """First those left out, then so many, from 0 s on, as dense as asked for: limit counted those left out, or times were scaled with the
    offset of the trace's clock."""
    rng = random.Random(seed)
    for _ in range(30):
        path = random_trace(rng, tmp_path)
        every = workload.load(path).all_requests()
        skip, limit, scale = rng.randrange(len(every)), rng.randint(1, 50), rng.choice([1, 0.25, rng.uniform(0.01, 9)])
        trace = workload.load(path, [f"trace_skip={skip}", f"trace_limit={limit}", f"trace_time_scale={scale}"]).read()
        expected = every[skip : skip + limit]
        assert [r.prompt_tokens for r in trace.requests] == [r.prompt_tokens for r in expected]
        assert trace.requests[0].arrival == 0
        assert [r.arrival for r in trace.requests] == pytest.approx([(r.arrival - expected[0].arrival) * scale for r in expected])
        assert f"{len(expected)} request" in trace.note
        if len(expected) < len(every):
            assert f"; taken: {skip + 1} to {skip + len(expected)} of {len(every)}" in trace.note
        assert ("times multiplied by" in trace.note) == (scale != 1)


def test_parts_make_up_the_whole(tmp_path: Path, seed: int) -> None:
    """Skipping what a limit took leaves the rest, and no options are the whole trace."""
    rng = random.Random(seed)
    path = random_trace(rng, tmp_path)
    every = workload.load(path).read()
    cut = rng.randint(1, len(every.requests))
    parts = workload.load(path, [f"trace_limit={cut}"]).all_requests()
    if cut < len(every.requests):
        parts += workload.load(path, [f"trace_skip={cut}"]).all_requests()
    assert [r.prompt_tokens for r in parts] == [r.prompt_tokens for r in every.requests]
    assert "taken" not in every.note
    assert workload.load(path, ["trace_skip=0", "trace_limit=0", "trace_time_scale=1.0"]).read() == every


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["trace_skip=2"], "trace_skip is 2; allowed: 0 to 1, for the trace has 2 requests with an answer"),
        (["trace_time_scale=0"], "Expected `float` > 0"),
        (["trace_time_scale=inf"], "Expected `float` <= "),
        (["trace_limit=-1"], "Expected `int` >= 0"),
    ],
)
def test_bad_parts(settings: list[str], words: str, tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", rows_of("burstgpt.csv", [(5, 5), (6, 6), (7, 0)]))
    with pytest.raises(Refused, match=words):
        workload.load(str(path), settings).read()


@pytest.mark.parametrize("option", ["--limit=3", "--skip=0", "--time-scale=1"])
def test_parts_of_what_is_no_trace(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests that are drawn, and shapes, have no parts: it would be ignored without a word."""
    for work in ("chat", "bf16-1x1K-h16"):
        assert main(["bench", work, "--list", option]) == 2
        said = capsys.readouterr().err
        assert "trace_" in said and "allowed: with a " in said
        assert said.count("\n") == 1


def test_options_of_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--skip, --limit and --time-scale reach the steps, and what they take is said."""
    path = written(tmp_path, "t.csv", rows_of("azure.csv", [(100 * i, 1) for i in range(1, 9)]))
    assert main(["bench", str(path), "--list", "--json", "--skip", "2", "--limit", "3", "--time-scale", "10"]) == 0
    said = capsys.readouterr()
    assert [item["shape"]["lengths"] for item in json.loads(said.out)] == [[301], [401], [501]]
    assert [item["step"]["seconds"] for item in json.loads(said.out)] == pytest.approx([0, 10, 20])
    assert "3 requests in 20.0 s; taken: 3 to 5 of 8, times multiplied by 10\n" in said.err


# ---- Files as people have them ----

BURST = "Timestamp,Model,Request tokens,Response tokens\n5,Modèle,472,18\n45,GPT-4,87,2\n"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_encodings(packed: bool, encoding: str, line_end: str, tmp_path: Path) -> None:
    """A byte order mark hid the first column, UTF-16 and Latin-1 were tracebacks, and .gz had to be unpacked."""
    data = BURST.replace("\n", line_end).encode(encoding)
    path = tmp_path / ("t.csv.gz" if packed else "T.CSV")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert [(r.arrival, r.prompt_tokens) for r in read_trace(path)] == [(0, 472), (40, 87)]


def test_a_workload_file_with_a_mark(tmp_path: Path) -> None:
    written(tmp_path, "t.csv", BURST)
    (tmp_path / "w.toml").write_bytes('trace = "t.csv"\ndescription = "größer"\n'.encode("utf-8-sig"))
    assert len(workload.load(str(tmp_path / "w.toml")).all_requests()) == 2
    (tmp_path / "w.toml").write_bytes(bytes(range(256)))
    with pytest.raises(Refused, match=r"workload .*w.toml is no text, but binary"):
        workload.load(str(tmp_path / "w.toml"))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.csv.gz", "t.jsonl.gz"])
def test_what_is_no_text(name: str, tmp_path: Path, seed: int) -> None:
    """One sentence without control characters."""
    rng = random.Random(seed)
    path = tmp_path / name
    for data in (
        rng.randbytes(3000),
        b"PAR1" + rng.randbytes(500),
        BURST.encode("utf-16-le"),
        gzip.compress(BURST.encode())[:40],
        gzip.compress(rng.randbytes(99)),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
        BURST.encode() + b"\0",
        b"[" * 100_000,
        b'"' * 200_001 + b",\n",
    ):
        path.write_bytes(data)
        with pytest.raises(Refused) as refused:
            read_trace(path)
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 600


def test_a_device_is_not_read_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full and /dev/zero have none: reading one took all memory."""
    for name in ("t.csv", "w.toml", "c.json", "g.toml"):
        (tmp_path / name).symlink_to("/dev/zero")
    trace, toml, json_file, gpu = (str(tmp_path / name) for name in ("t.csv", "w.toml", "c.json", "g.toml"))
    for arguments in (
        ("bench", trace, "--list"),
        ("bench", toml, "--list"),
        ("report", json_file),
        ("model", "validate", json_file),
        ("model", "calibrate", json_file),
        ("model", "roofline", "--gpu", gpu),
    ):
        assert main([*arguments]) == 2
        said = capsys.readouterr().err
        assert "it is a device" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["mooncake.jsonl", "burstgpt.csv"])
def test_standard_input(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "-": the format is seen from the text."""
    data = rows_of(name, [(5, 5), (6, 6)]).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(data) if packed else data)))
    chosen = workload.load("-")
    assert chosen.name == "standard-input"
    assert [r.prompt_tokens for r in chosen.all_requests()] == [5, 6]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(Refused, match="standard input, which is closed"):
        chosen.all_requests()


@pytest.mark.parametrize("name", workload.shipped())
def test_shipped_workloads(name: str) -> None:
    """Draw the same requests each time, others with another seed, and within their limits."""
    chosen = workload.load(name)
    requests = chosen.all_requests()
    assert requests == workload.load(name).all_requests()
    assert requests != workload.load(name, ["seed=99"]).all_requests()
    assert len(requests) == sum(kind.count for kind in chosen.requests)
    assert all(a.arrival <= b.arrival for a, b in pairwise(requests))
    most = max(kind.prefix_tokens + kind.prompt.most for kind in chosen.requests)
    assert all(1 <= r.prompt_tokens <= most for r in requests)


def test_the_workloads_the_issue_asks_for() -> None:
    assert workload.shipped() == ["agents", "chat", "long-documents"]
    long = [r for r in workload.load("long-documents").all_requests() if r.prompt_tokens == 65_536 and r.arrival == 0]
    assert len(long) == 16
    agents = workload.load("agents").all_requests()
    assert len({r.blocks for r in agents}) == 4
    assert {r.speculative_tokens for r in agents} == {3}


def test_workload_file_with_a_trace(tmp_path: Path) -> None:
    """The trace is looked for beside the file."""
    written(tmp_path, "t.jsonl", '{"arrival": 0, "prompt_tokens": 5, "answer_tokens": 1}')
    path = written(tmp_path, "mine.toml", 'trace = "t.jsonl"\n[model]\nheads = 8\n')
    chosen = workload.load(str(path), ["model.kv_format=e4m3", "scheduler.max_batch=3"])
    assert (chosen.name, chosen.model.heads, chosen.model.kv_format, chosen.scheduler.max_batch) == ("mine", 8, "e4m3", 3)
    assert len(chosen.all_requests()) == 1


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("chit-chat", [], "workload is 'chit-chat'; allowed: agents, chat, long-documents"),
        ("chat", ["model.heads=129"], "Expected `int` <= 128 - at `\\$.model.heads`"),
        ("chat", ["model.colour=1"], "unknown field `colour`"),
        ("chat", ["heads"], "setting is 'heads'; allowed: NAME=VALUE"),
        ("chat", ["seed.x=1"], "seed has no fields of its own"),
        ("chat", ["requests=[]"], "neither requests and a trace"),
        ("chat", ["trace=x.csv"], "both requests and a trace"),
        ("chat", ["model.kv_format=e5m2"], "kv_format is 'e5m2'; allowed: bf16, fp16, e4m3"),
        ("chat", ["model.page_size=48"], "page_size is 48; allowed: powers of two from 1 to 256"),
        ("chat", ["model.page_size=512"], "page_size is 512; allowed: powers of two from 1 to 256"),
        ("chat", ["model.d_latent=128"], "is \\(128, 64\\); allowed with bf16: \\(512, 64\\), \\(512, 0\\), \\(256, 64\\)"),
        ("chat", ["model.kv_format=e4m3_656", "model.d_rope=0"], "is \\(512, 0\\); allowed with e4m3_656: \\(512, 64\\)"),
        ("chat", ["scheduler.step_ms=inf"], "Expected `float` <= "),
        ("chat", ["scheduler.step_ms=nan"], "Expected `float` > 0"),
        ("chat", ["scheduler.acceptance=2"], "Expected `float` <= 1"),
    ],
)
def test_bad_workload(source: str, settings: list[str], words: str) -> None:
    with pytest.raises(Refused, match=words):
        workload.load(source, settings)
