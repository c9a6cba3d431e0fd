"""Models by name: what attention each does, one small TOML file each (models/), in which every number has a source."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import msgspec
from msgspec import Struct

from etap_bench.errors import Refused
from etap_bench.shape import check_layer


class Preset(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model with MLA.

    title, names: what it is called, and what else people call it and its relatives with the same attention
    heads: of a layer, on all cards together
    layers: those with MLA
    topk: KV tokens that each query token attends to; 0: all
    kv_format: the usual one, as in etap_py.Problem
    sources: where each number comes from
    """

    title: str
    names: tuple[str, ...] = ()
    heads: int
    layers: int
    d_latent: int
    d_rope: int
    topk: int = 0
    kv_format: str = "bf16"
    sources: dict[str, str]

    def __post_init__(self) -> None:
        numbers = {"heads", "layers", "d_latent", "d_rope"} | ({"topk", "kv_format"} if self.topk else set())
        missing = sorted(numbers - self.sources.keys())
        if missing:
            raise ValueError(f"sources has no entry for {', '.join(missing)}")
        check_layer(self.kv_format, 64, self.d_latent, self.d_rope)

    def of_card(self, cards: int) -> dict[str, Any]:
        """Fields of workload.Model for one of `cards` cards that share the heads, where the last may hold fewer. Raises Refused where one
        would hold none."""
        if cards > self.heads:
            raise Refused(f"tp / dp is {cards}; allowed: 1 to {self.heads}, the heads of {self.title}")
        fields: dict[str, Any] = {name: getattr(self, name) for name in ("layers", "d_latent", "d_rope", "topk", "kv_format")}
        return {"heads": -(-self.heads // cards), **fields}


def load(name: str) -> Preset:
    """The model that is called so. Raises Refused for what nobody is called."""
    return packaged()[name_of(name)]


def name_of(name: str) -> str:
    """The name among `packaged` of the model that is called so, in whatever case and with whatever dashes. Raises Refused for what nobody
    is called."""
    for known, preset in packaged().items():
        if _plain(name) in map(_plain, (known, preset.title, *preset.names)):
            return known
    raise Refused(f"model is {name!r}; allowed: {', '.join(packaged())}")


@cache
def packaged() -> dict[str, Preset]:
    """All, by name ("kimi-k2"), in alphabetical order."""
    files = sorted((resources.files("etap_bench") / "models").iterdir(), key=lambda file: file.name)
    files = [file for file in files if file.name.endswith(".toml")]
    return {file.name.removesuffix(".toml"): msgspec.toml.decode(file.read_bytes(), type=Preset) for file in files}


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
