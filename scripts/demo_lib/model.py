"""A small language model with DeepSeek-V2's architecture: multi-head latent attention with a latent of 512 and rope of 64.

It has what it takes to be served by SGLang as `DeepseekV2ForCausalLM` and to be trained in minutes: parameters carry the
names of the published checkpoints, attention is written in its unabsorbed form (a server absorbs `kv_b_proj`), and every
layer's feed-forward part is dense.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions. The latent and rope widths are those of every DeepSeek-V2/V3 model: they are what libetap is built for."""

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 2
    num_heads: int = 16
    qk_nope_head_dim: int = 16
    v_head_dim: int = 16
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    max_positions: int = 8192
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    num_experts: int = 2
    tied: bool = False
    """While trained, one table for both ends: `embed_tokens` is `lm_head` times the root of the width (see `untied`)."""
    draft_layers: int = 0
    """1: DeepSeek-V3's architecture, with a layer for multi-token prediction (MTP) behind the others."""
    q_lora_rank: int | None = None
    """The width that queries are compressed to. Indexers need it: they make their own queries from it."""
    index_topk: int = 0
    """DeepSeek-V3.2's architecture: an indexer in each layer chooses so many tokens for each query token. 0: there is none."""
    index_heads: int = 4
    index_head_dim: int = 128  # the only one that SGLang has a cache for

    @property
    def version(self) -> str:
        """DeepSeek's, with the least that has what is asked for."""
        return "32" if self.index_topk else "3" if self.draft_layers else "2"

    def hugging_face(self) -> dict[str, object]:
        """The content of config.json."""
        indexer = {"index_topk": self.index_topk, "index_n_heads": self.index_heads, "index_head_dim": self.index_head_dim}
        return (indexer if self.index_topk else {}) | {
            "architectures": [f"DeepseekV{self.version}ForCausalLM"],
            "model_type": f"deepseek_v{self.version}",
            "num_nextn_predict_layers": self.draft_layers,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            # Factor 1 leaves the frequencies as they are, and makes SGLang take DeepSeek's rotary embedding.
            "rope_scaling": {
                "type": "yarn",
                "factor": 1.0,
                "original_max_position_embeddings": self.max_positions,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            # Dense everywhere: the first layer with experts is the one after the last, a draft layer.
            "first_k_dense_replace": self.num_layers,
            "moe_layer_freq": 1,
            "n_routed_experts": self.num_experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": self.intermediate_size,
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


TRAINED = ModelConfig(
    hidden_size=256,
    intermediate_size=640,
    num_layers=4,
    num_heads=8,
    qk_nope_head_dim=32,
    v_head_dim=32,
    max_positions=4096,
    tied=True,
)
"""The model whose weights are in this folder: 5.7 M parameters."""


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.num_heads
        q_width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, q_width, False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_width, False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, False)
        if config.index_topk:
            self.indexer = Indexer(config)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """All tokens are seen, whatever an indexer would choose."""
        c = self.config
        batch, length, _ = x.shape
        q = self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(batch, length, c.num_heads, -1)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, length, c.num_heads, -1)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = _rotate(k_rope.unsqueeze(2), rotation).expand(-1, -1, c.num_heads, -1)
        q = torch.cat([q_nope, _rotate(q_rope, rotation)], -1).transpose(1, 2)
        k = torch.cat([k_nope, k_rope], -1).transpose(1, 2)
        v = v.transpose(1, 2)
        if x.is_cuda:  # PyTorch's flash attention wants one head width
            v = functional.pad(v, (0, q.shape[-1] - c.v_head_dim))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)[..., : c.v_head_dim]
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary embedding on interleaved pairs. x [batch, length, heads, rope], rotation [2, positions, rope / 2]."""
    cos, sin = rotation[:, : x.shape[1], None]
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
    return rotated.flatten(-2).to(x.dtype)


class Indexer(nn.Module):
    """The parameters of what chooses tokens for sparse attention. Only a server computes with them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wq_b = nn.Linear(config.q_lora_rank, config.index_heads * config.index_head_dim, False)
        self.wk = nn.Linear(config.hidden_size, config.index_head_dim, False)
        self.k_norm = nn.LayerNorm(config.index_head_dim)
        self.weights_proj = nn.Linear(config.hidden_size, config.index_heads, False)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotation))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Experts(nn.Module):
    """The parameters of a feed-forward part with experts. Only a server computes with them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.num_experts))
        self.shared_experts = FeedForward(config)


class DraftLayer(Layer):
    """The parameters of a layer for multi-token prediction, which every published checkpoint gives experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.mlp = Experts(config)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not config.tied:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.layers.extend(DraftLayer(config) for _ in range(config.draft_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """Token ids [batch, length] to logits [batch, length, vocab_size]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Outputs that feed the residual stream start smaller, by the number of them (GPT-2).
                depth = (2 * config.num_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                width = 1.0 if name.endswith("embed_tokens.weight") else parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=width * depth)
        frequencies = config.rope_theta ** (-torch.arange(0, config.qk_rope_head_dim, 2) / config.qk_rope_head_dim)
        angles = torch.outer(torch.arange(config.max_positions), frequencies)
        self.register_buffer("rotation", torch.stack((angles.cos(), angles.sin())), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.config.tied:
            x = functional.embedding(tokens, self.lm_head.weight) * self.config.hidden_size**0.5
        else:
            x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer in self.model.layers[: self.config.num_layers]:
            x = layer(x, self.rotation)
        return self.lm_head(self.model.norm(x))


def untied(weights: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The parameters of a tied model as those of the same model with two tables, which is what a server loads."""
    return {"model.embed_tokens.weight": weights["lm_head.weight"] * config.hidden_size**0.5, **weights}
