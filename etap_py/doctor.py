"""What `etap doctor` finds out: the library, its devices and whether they compute right, versions, the seams of SGLang and vLLM."""

from __future__ import annotations

import json
import platform
import urllib.request
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import numpy as np

from etap_py import tuning
from etap_py.binding import lib, path
from etap_py.decode import Plan, query
from etap_py.problem import DeviceInfo, Problem, device_count, device_info
from etap_py.seams import installed

_PACKAGES = (
    *("etap-py", "numpy", "cffi", "torch", "etap-sglang", "sglang", "etap-vllm", "vllm"),
    *("etap-flashmla", "etap-flashinfer", "etap-flash-attn-3"),
)


@dataclass(frozen=True)
class SelfTest:
    """A small decode against FP64."""

    passed: bool
    kernel: str
    detail: str


@dataclass(frozen=True)
class Device:
    """A device, and what it computed when it is usable."""

    device: str  # "cpu", "cuda:0"
    info: DeviceInfo
    self_test: SelfTest | None
    tuning: str  # what `etap tune` stored for it


@dataclass(frozen=True)
class Seam:
    """A place of SGLang or vLLM that the attention backend hooks into."""

    name: str
    found: bool
    detail: str


@dataclass(frozen=True)
class Served:
    """Attention calls (one layer of one step each) that a scheduler process of a running SGLang server counted."""

    process: int
    step: str  # "decode", "extend", "verify", "draft" or "draft_extend"
    kernel: str  # libetap's, or "triton" where SGLang's backend served
    calls: int


@dataclass(frozen=True)
class Report:
    """Everything that was found. `ok`: a device is usable, every usable device passed its test, no seam is missing."""

    ok: bool
    library: str
    library_version: str
    abi_version: int
    devices: list[Device]
    python: str
    packages: dict[str, str | None]  # None: not installed
    sglang: str  # what was done about SGLang, in words
    vllm: str  # likewise
    seams: list[Seam] = field(default_factory=list)  # of SGLang
    vllm_seams: list[Seam] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)  # by the server that was asked

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(server: str | None = None) -> Report:
    """Looks at this machine, and asks the SGLang server with the URL `server`, if one is given, what it computed with libetap. Every
    usable device solves a small problem. Raises ConnectionError when the server does not answer."""
    number = lib.etap_version()
    devices = [_device(kind, index) for kind in ("cpu", "cuda") for index in range(max(1, device_count(kind)))]
    tests = [device.self_test for device in devices if device.self_test is not None]
    sglang, seams = _seams("sglang")
    vllm, vllm_seams = _seams("vllm")
    return Report(
        ok=bool(tests) and all(test.passed for test in tests) and all(seam.found for seam in (*seams, *vllm_seams)),
        library=str(path),
        library_version=f"{number // 10000}.{number // 100 % 100}.{number % 100}",
        abi_version=lib.etap_abi_version(),
        devices=devices,
        python=platform.python_version(),
        packages={name: _version(name) for name in _PACKAGES},
        sglang=sglang,
        vllm=vllm,
        seams=seams,
        vllm_seams=vllm_seams,
        served=served_by(server) if server else [],
    )


def served_by(server: str) -> list[Served]:
    """What the SGLang server with this URL counted; nothing when its attention backend is another. Raises ConnectionError."""
    try:
        with urllib.request.urlopen(f"{server.rstrip('/')}/server_info", timeout=30) as answer:
            states = json.load(answer)["internal_states"]
    except (OSError, ValueError, KeyError) as failure:
        raise ConnectionError(f"there is no SGLang server that answers at {server}: {failure}") from failure
    return [Served(process, **counted) for process, state in enumerate(states) for counted in state.get("etap", [])]


def _device(kind: str, index: int) -> Device:
    info = device_info(kind, index)
    name = kind if kind == "cpu" else f"{kind}:{index}"
    if not info.usable:
        return Device(name, info, None, "")
    return Device(name, info, self_test(name), tuning.state(Problem(num_heads=1, batch=1, device=name)))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _seams(framework: str) -> tuple[str, list[Seam]]:
    """What the plugin for "sglang" or "vllm" finds in the framework that is installed, and in words what was done."""
    try:
        seams = __import__(f"etap_{framework}", fromlist=["seams"]).seams
    except ImportError as failure:
        return f"the plugin etap-{framework} is not installed ({failure})", []
    if not installed(framework):
        return f"{framework} is not installed", []
    return f"seams looked for in the installed {framework}", [Seam(*found) for found in seams.probe()]


def self_test(device: str) -> SelfTest:
    """Three sequences of random BF16 values on `device` ("cpu", "cuda:0") against FP64, to the tolerance of the test suite."""
    rng = np.random.default_rng()
    lens = np.array([200, 1, 0], np.int32)
    problem = Problem(num_heads=16, batch=len(lens), device=device)
    q = _bf16(rng.standard_normal((problem.rows, 16, 576)) * 15)
    kv = _bf16(rng.standard_normal((5, 64, 576)) * 0.1)
    table = np.array([[3, 1, 4, 0], [2, -1, -1, -1], [-1] * 4], np.int32)
    scale = 576**-0.5
    try:
        kernel = query(problem).kernel
        if device == "cpu":
            out = _decode(problem, (q, kv, table, lens), scale)
        else:
            import torch

            if not torch.cuda.is_available():
                return SelfTest(False, kernel, "this PyTorch, which would allocate the test's memory, sees no CUDA device")
            moved = tuple(torch.from_numpy(array).to(device) for array in (q, kv, table, lens))
            out = _decode(problem, moved, scale).view(torch.uint16).cpu().numpy()
    except (ImportError, RuntimeError) as failure:  # EtapError among them
        return SelfTest(False, "", str(failure))

    worst = 0.0
    for b, length in enumerate(lens):
        rows = _fp64(kv)[table[b]].reshape(-1, 576)[:length]
        logits = _fp64(q)[b] @ rows.T * scale
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
        total = weights.sum(axis=-1, keepdims=True) if length else 1.0  # no token: out = 0
        expected = weights @ rows[:, :512] / total
        tolerance = np.maximum(8e-4, 2.01 / 128 * np.abs(expected))
        worst = max(worst, float(np.max(np.abs(_fp64(out)[b] - expected) / tolerance)))
    return SelfTest(worst <= 1, kernel, f"largest error {worst:.0%} of the tolerance, against FP64")


def _decode(problem: Problem, tensors: tuple[Any, ...], scale: float) -> Any:
    q, kv, table, lens = tensors
    plan = Plan(problem)
    plan.update(lens)
    out, _ = plan.run(q[..., :512], q[..., 512:], kv, table, softmax_scale=scale, return_lse=False)
    return out


def _bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The bits of BF16: the upper half of FP32's."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _fp64(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
