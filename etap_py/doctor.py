"""What `etap doctor` finds out: the library, its devices and whether they compute right, versions, the seams of SGLang and vLLM.

Whatever it looks at may be what is broken: that is then said, and the rest is looked at all the same.
"""

from __future__ import annotations

import http.client
import json
import platform
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from etap_py.library import library_path
from etap_py.seams import installed
from etap_py.terminal import sentence

library_problem = ""  # why the library can't be used
try:
    from etap_py import tuning
    from etap_py.binding import lib
    from etap_py.decode import Plan, query
    from etap_py.problem import Problem, device_count, device_info
except ImportError as failure:
    library_problem = sentence(failure)

if TYPE_CHECKING:
    from etap_py.problem import DeviceInfo


_NAMES = {"sglang": "SGLang", "vllm": "vLLM"}
_VENDOR, _DISPLAY_CLASSES = "0x10de", ("0x0300", "0x0302")  # PCI: NVIDIA; VGA and 3D controllers

_PACKAGES = (
    *("etap-py", "numpy", "cffi", "torch", "etap-sglang", "sglang", "etap-vllm", "vllm"),
    *("etap-bench", "etap-flashmla", "etap-flashinfer", "etap-flash-attn-3"),
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
    """Everything that was found. `ok`: the library can be used, a device is usable, every usable device passed its test, no seam is
    missing, the server that was asked answered, and everything required is there."""

    ok: bool
    library: str  # its path, "" where none was found
    library_problem: str  # why it can't be used, ""
    library_version: str  # "" where it can't be used
    abi_version: int | None
    devices: list[Device]
    python: str
    packages: dict[str, str | None]  # None: not installed
    sglang: str  # what was done about SGLang, in words
    vllm: str  # likewise
    warnings: list[str]  # what works less than this machine could, each with the remedy
    missing: list[str]  # what was required and is not there, and why
    seams: list[Seam] = field(default_factory=list)  # of SGLang
    vllm_seams: list[Seam] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)  # by the server that was asked
    server_problem: str = ""  # why it said nothing

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(server: str | None = None, require: Sequence[str] = ()) -> Report:
    """Looks at this machine, and asks the SGLang server with the URL `server`, if one is given, what it computed with libetap. Every
    usable device solves a small problem. `require`: what must work: "cuda", "sglang", "vllm"."""
    devices = [] if library_problem else [_device(kind, index) for kind in ("cpu", "cuda") for index in range(max(1, device_count(kind)))]
    tests = [device.self_test for device in devices if device.self_test is not None]
    sglang, seams = _seams("sglang")
    vllm, vllm_seams = _seams("vllm")
    missing = [_missing_cuda(devices)] if "cuda" in require else []
    missing += [_missing(*found) for found in (("sglang", sglang, seams), ("vllm", vllm, vllm_seams)) if found[0] in require]
    missing = [why for why in missing if why]
    served, server_problem = [], ""
    if server:
        try:
            served = served_by(server)
        except ConnectionError as failure:
            server_problem = sentence(failure)
    well = bool(tests) and all(test.passed for test in tests) and all(seam.found for seam in (*seams, *vllm_seams))
    return Report(
        ok=well and not library_problem and not missing and not server_problem,
        library=_library(),
        library_problem=library_problem,
        library_version="" if library_problem else _words(lib.etap_version()),
        abi_version=None if library_problem else lib.etap_abi_version(),
        devices=devices,
        python=platform.python_version(),
        packages={name: _version(name) for name in _PACKAGES},
        sglang=sglang,
        vllm=vllm,
        warnings=[*_cuda_warnings(devices), *_plugin_warnings()],
        missing=missing,
        seams=seams,
        vllm_seams=vllm_seams,
        served=served,
        server_problem=server_problem,
    )


def _library() -> str:
    try:
        return str(library_path())
    except ImportError:
        return ""


def _words(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _missing_cuda(devices: list[Device]) -> str:
    """Why CUDA was required in vain; "" where it works."""
    if library_problem:
        return "cuda: the library can't be used"
    cuda = [device for device in devices if device.device.startswith("cuda")]
    if any(device.self_test is not None and device.self_test.passed for device in cuda):
        return ""
    return f"cuda: {'; '.join(device.info.reason or 'the self-test failed' for device in cuda)}"


def _missing(framework: str, state: str, seams: list[Seam]) -> str:
    """Why a framework was required in vain; "" where all its seams are there."""
    if library_problem:
        return f"{framework}: the library can't be used"
    if not seams:
        return f"{framework}: {state}"
    lost = [seam.name for seam in seams if not seam.found]
    return f"{framework}: these seams are missing: {', '.join(lost)}" if lost else ""


def _cuda_warnings(devices: list[Device]) -> list[str]:
    """An NVIDIA card that the library does not use."""
    cuda = [device for device in devices if device.device.startswith("cuda")]
    if not cuda or any(device.info.usable for device in cuda) or not nvidia_cards():
        return []
    reason = cuda[0].info.reason
    if "built without CUDA" in reason:
        remedy = "install a wheel of etap-py with CUDA, or build it where nvcc is on PATH (make CUDA=1)"
    else:
        remedy = "ETAP's kernels need a Hopper card (H20, H100, H200, H800), a driver that fits, and in a container access to the card"
    return [f"this machine has an NVIDIA card that is not used: {reason}; {remedy}"]


def nvidia_cards(root: Path = Path("/")) -> int:
    """NVIDIA cards of this machine, with or without a driver and whether or not this process may use them."""

    def text(file: Path) -> str:
        try:
            return file.read_text().strip()
        except (OSError, ValueError):
            return ""

    on_bus = [
        device
        for device in root.glob("sys/bus/pci/devices/*")
        if text(device / "vendor") == _VENDOR and text(device / "class").startswith(_DISPLAY_CLASSES)
    ]
    of_driver = list(root.glob("proc/driver/nvidia/gpus/*"))
    nodes = list(root.glob("dev/nvidia[0-9]*"))
    return max(map(len, (on_bus, of_driver, nodes)))


def _plugin_warnings() -> list[str]:
    """Plugins of ours whose framework is not there."""
    return [
        f"the plugin etap-{framework} is installed and {name} is not: pip install {framework}, or pip uninstall etap-{framework}"
        for framework, name in _NAMES.items()
        if _plugin(framework)[0] is not None and not _installed(framework)
    ]


def served_by(server: str) -> list[Served]:
    """What the SGLang server with this URL counted; nothing when its attention backend is another. Raises ConnectionError."""
    try:
        with urllib.request.urlopen(f"{server.rstrip('/')}/server_info", timeout=30) as answer:
            states = json.load(answer)["internal_states"]
        return [Served(process, **counted) for process, state in enumerate(states) for counted in state.get("etap", [])]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as failure:  # or another server
        raise ConnectionError(f"there is no SGLang server that answers at {server}: {sentence(failure)}") from failure


def _device(kind: str, index: int) -> Device:
    info = device_info(kind, index)
    name = kind if kind == "cpu" else f"{kind}:{index}"
    if not info.usable:
        return Device(name, info, None, "")
    try:
        tuned = tuning.state(Problem(num_heads=1, batch=1, device=name))
    except Exception as failure:  # a file or a home folder that is not as it should be
        tuned = f"not known: {sentence(failure)}"
    return Device(name, info, self_test(name), tuned)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except Exception:  # not installed, or what is installed of it is damaged
        return None


def _installed(framework: str) -> bool:
    try:
        return installed(framework)
    except Exception:  # a package that can't even be looked for
        return False


def _plugin(framework: str) -> tuple[Any, str]:
    """The module of the plugin's seams, or None and why not."""
    try:
        return __import__(f"etap_{framework}", fromlist=["seams"]).seams, ""
    except ModuleNotFoundError as failure:
        return None, f"the plugin etap-{framework} is not installed ({failure})"
    except Exception as failure:  # it can fail in as many ways as what it imports
        return None, f"the plugin etap-{framework} can't be imported: {sentence(failure)}"


def _seams(framework: str) -> tuple[str, list[Seam]]:
    """What the plugin for "sglang" or "vllm" finds in the framework that is installed, and in words what was done."""
    seams, why_not = _plugin(framework)
    if seams is None:
        return why_not, []
    if not _installed(framework):
        return f"{framework} is not installed", []
    words = f"seams looked for in the installed {framework}"
    try:
        return words, [Seam(*found) for found in seams.probe()]
    except Exception as failure:  # a source file that is no Python, for instance
        return words, [Seam(framework, False, f"it can't be looked at: {sentence(failure)}")]


def self_test(device: str) -> SelfTest:
    """Three sequences of random BF16 values on `device` ("cpu", "cuda:0") against FP64, to the tolerance of the test suite."""
    rng = np.random.default_rng()
    lens = np.array([200, 1, 0], np.int32)
    problem = Problem(num_heads=16, batch=len(lens), device=device)
    q = _bf16(rng.standard_normal((problem.rows, 16, 576)) * 15)
    kv = _bf16(rng.standard_normal((5, 64, 576)) * 0.1)
    table = np.array([[3, 1, 4, 0], [2, -1, -1, -1], [-1] * 4], np.int32)
    scale = 576**-0.5
    kernel = ""
    try:
        kernel = query(problem).kernel
        if device == "cpu":
            out = _decode(problem, (q, kv, table, lens), scale)
        else:
            import torch

            if not torch.cuda.is_available():
                detail = f"this PyTorch ({torch.__version__}), which would allocate the test's memory, sees no CUDA device"
                return SelfTest(False, kernel, f"{detail}: install one that is built for CUDA")
            moved = tuple(torch.from_numpy(array).to(device) for array in (q, kv, table, lens))
            out = _decode(problem, moved, scale).view(torch.uint16).cpu().numpy()
    except ModuleNotFoundError as failure:
        return SelfTest(False, kernel, f"{failure}, and the test's memory is allocated with it: pip install 'etap-py[torch]'")
    except Exception as failure:  # EtapError, or whatever a broken PyTorch raises
        return SelfTest(False, kernel, sentence(failure))

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
