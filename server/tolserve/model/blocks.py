"""The pieces a layer is made of, shared by the training form and the serving form.

Source: paper eq. 2.4-2.6 and section 4.2; attention, rotary positions and SwiGLU as in LLaMA.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolserve.model.config import ModelConfig

# (layer, q [..., heads, head_dim], k and v [..., kv_heads, head_dim]) -> [..., heads, head_dim].
# q and k are not rotated yet: whoever attends knows the positions.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# (layer, x [..., d]) -> x + that layer's row for every token. Asked only after the layer's attention, which is when a
# row is first needed; whoever serves from a table waits there.
AddRow = Callable[[int, Tensor], Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 whatever the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_tables(config: ModelConfig, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [positions, head_dim] float32, in LLaMA's half-split layout."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), config.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [..., tokens, heads, head_dim]; cos and sin are [tokens, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(x.dtype)


class Attention(nn.Module):
    """Projections around a causal attention that the caller supplies."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(layer, q, k, v).flatten(-2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): base's FFN, and the FFN whose outputs a table holds."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FlexCompute(nn.ModuleList):
    """FFN-C: `flex_beta` square maps with SiLU between them.

    The paper calls FFN-C "a linear dense module which operates on the residual flow" of beta * h^2 parameters and
    gives no formula. This class and where `Layer.forward` calls it are the only places that hold our reading. It may
    not be the paper's: with a SiLU before the first map too, flex-1 learned better (docs/paper.md, Table 2).
    """

    def __init__(self, hidden_size: int, beta: int) -> None:
        super().__init__(nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(beta))

    def forward(self, x: Tensor) -> Tensor:
        for index, linear in enumerate(self):
            x = linear(F.silu(x) if index else x)
        return x


class Layer(nn.Module):
    """One transformer layer; `with_memory` adds the FFN that the serving form replaces by rows.

    base:    x~ = x + attn(norm(x));  out = x~ + mlp(norm(x~))
    memory:  out = x + attn(norm(x)) + row
    flex:    x~ = x + attn(norm(x));  out = x~ + compute(norm(x~)) + row
    """

    def __init__(self, config: ModelConfig, with_memory: bool) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.variant = config.ffn_variant
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = Attention(config)
        if config.ffn_variant == "base":
            self.post_attention_layernorm = RMSNorm(size, eps)
            self.mlp = SwiGLU(size, config.intermediate_size)
        if config.ffn_variant == "flex":
            self.compute_layernorm = RMSNorm(size, eps)
            self.compute = FlexCompute(size, config.flex_beta)
        if with_memory:
            self.memory_layernorm = RMSNorm(size, eps)
            self.memory = SwiGLU(size, config.intermediate_size)

    def memory_row(self, embedding: Tensor) -> Tensor:
        """FFN_L(norm_L(X_0)) for embeddings [..., d]: what the table stores (eq. 2.6). Needs `with_memory`."""
        return self.memory(self.memory_layernorm(embedding))

    def forward(self, x: Tensor, layer: int, attend: Attend, add_row: AddRow) -> Tensor:
        """x [..., d] -> [..., d]."""
        x = x + self.self_attn(self.input_layernorm(x), layer, attend)
        if self.variant == "base":
            return x + self.mlp(self.post_attention_layernorm(x))
        if self.variant == "flex":
            x = x + self.compute(self.compute_layernorm(x))
        return add_row(layer, x)
