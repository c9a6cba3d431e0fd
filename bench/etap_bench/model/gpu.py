"""GPUs as the model sees them: one small TOML file each, in which every number has a source."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from etap_bench.model import files


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A Hopper GPU. `sources` says for each number where it comes from."""

    title: str  # "H100 SXM"
    device_names: tuple[str, ...]  # what CUDA calls it
    short_names: tuple[str, ...] = ()  # what people call it
    num_sms: int
    bf16_tflops: float  # tensor cores, dense, FP32 accumulation
    flop_per_cycle: int  # of one SM, likewise
    hbm_tbs: float  # 10^12 bytes a second
    hbm_gb: float
    l2_mb: float
    power_w: float
    max_clusters: tuple[int, ...] = ()  # clusters of 1, 2, .. 8 CTAs (one an SM) that run at a time; empty: as many as fit by number
    sources: dict[str, str]

    def __post_init__(self) -> None:
        numbers = {field for field in self.__struct_fields__ if field not in ("title", "device_names", "short_names", "sources")}
        if not self.max_clusters:
            numbers.remove("max_clusters")
        missing = sorted(numbers - self.sources.keys())
        if missing:
            raise ValueError(f"sources has no entry for {', '.join(missing)}")
        wrong = sorted(name for name in numbers - {"max_clusters"} if not getattr(self, name) > 0)
        if wrong:
            raise ValueError(f"{wrong[0]} is {getattr(self, wrong[0])}; allowed: numbers above 0")

    @property
    def sm_mhz(self) -> float:
        """The SM clock at which the tensor cores reach `bf16_tflops`."""
        return self.bf16_tflops * 1e6 / (self.num_sms * self.flop_per_cycle)

    def clusters(self, size: int, num_sms: int) -> int:
        """Clusters of `size` CTAs that run at a time on `num_sms` SMs, one CTA an SM."""
        by_number = num_sms // size
        return min(by_number, self.max_clusters[size - 1]) if self.max_clusters else by_number


@cache
def packaged_gpus() -> dict[str, Gpu]:
    """The descriptions that come with the package, by name ("h100-sxm")."""
    return {name: files.read(file, Gpu) for name, file in files.packaged("gpus", ".toml").items()}


def load_gpu(name: str) -> Gpu:
    """A packaged GPU by one of its names, or the description in the TOML file that `name` is the path of."""
    if name.lower().endswith(".toml"):
        return files.read(Path(name), Gpu)
    return packaged_gpus()[gpu_name(name)]


def gpu_name(name: str) -> str:
    """The packaged name of a GPU that is called by it, by its title or as CUDA calls it, in whatever case; the path of a TOML file stays.
    Raises ValueError for what nobody is called."""
    if name.lower().endswith(".toml"):
        return name
    for known, gpu in packaged_gpus().items():
        if _plain(name) in map(_plain, (known, gpu.title, *gpu.device_names, *gpu.short_names)):
            return known
    raise ValueError(f"gpu is {name!r}; allowed: {', '.join(packaged_gpus())}, or the path of a TOML file like theirs")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def gpu_of_device(device_name: str) -> str | None:
    """The name of the packaged GPU that CUDA calls `device_name`."""
    return next((name for name, gpu in packaged_gpus().items() if device_name in gpu.device_names), None)
