"""The whole transformer, in two forms that share their layers.

Training form (`with_memory=True`): FFNs are modules. Serving form: rows come from outside and the FFN weights do not
exist. A base model has no table, so its two forms are the same.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolserve.model.blocks import AddRow, Attend, Layer, RMSNorm, rotary_tables, rotate
from tolserve.model.config import ModelConfig


class _Body(nn.Module):
    """What LLaMA's tensor names put under `model.`."""

    def __init__(self, config: ModelConfig, with_memory: bool) -> None:
        super().__init__()
        # Not initialised here: on the meta device, where a checkpoint is loaded, nn.Embedding's own normal_ imports
        # torch._dynamo, 1.6 s of every start.
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        layers = nn.ModuleList(Layer(config, with_memory) for _ in range(config.num_hidden_layers))
        self.layers = cast(Sequence[Layer], layers)  # ModuleList does not say what it holds
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A decoder-only language model; parameter names are the checkpoint's tensor names."""

    def __init__(self, config: ModelConfig, with_memory: bool) -> None:
        super().__init__()
        self.config = config
        self.model = _Body(config, with_memory and config.has_memory)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def hidden(self, tokens: Tensor, attend: Attend, add_row: AddRow) -> Tensor:
        """Run the layers. tokens [...] int64 -> normed hidden states [..., d].

        `add_row(layer, x)` adds FFN_L(norm_L(X_0)) for every token; a base model never asks.
        """
        x = self.model.embed_tokens(tokens)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, index, attend, add_row)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Output head. hidden [..., d] -> [..., V] in the model's dtype."""
        return F.linear(hidden, self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)

    def live_rows(self, tokens: Tensor, alpha: float = 1.0) -> AddRow:
        """Rows computed by running the FFNs (training form), once per distinct token, scaled by `alpha`.

        The FFN's input is the token's embedding alone, so a batch needs one FFN evaluation per distinct id, about a
        quarter of the tokens at 8,192 tokens of English; gradients of repeated tokens add up in the gather's backward.
        """
        distinct, inverse = tokens.unique(return_inverse=True)
        embedding = self.model.embed_tokens(distinct)
        layers = self.model.layers

        def add_row(layer: int, x: Tensor) -> Tensor:
            # In the stream's precision: autocast's 16 bits would round a frequent token's gradient at every addition.
            row = F.embedding(inverse, layers[layer].memory_row(embedding).to(x.dtype))
            return x + (row if alpha == 1.0 else alpha * row)

        return add_row

    def forward(self, tokens: Tensor, alpha: float = 1.0) -> Tensor:
        """Training form: causal attention over whole sequences. tokens [B, S] int64 -> logits [B, S, V].

        `alpha` scales every row (paper Fig. 7); 0 shows the model without its memory. Raises ValueError for another
        `alpha` than 1 where there are no rows to scale.
        """
        if alpha != 1.0 and not self.config.has_memory:
            raise ValueError(f"alpha is {alpha}, but a base model has no rows to scale")
        cos, sin = rotary_tables(self.config, tokens.shape[-1], tokens.device)
        add_row = self.live_rows(tokens, alpha) if self.config.has_memory else no_rows
        return self.logits(self.hidden(tokens, causal_attention(cos, sin), add_row))

    def initialise(self, seed: int) -> None:
        """Random weights: normal, 0.02, residual outputs scaled by 1/sqrt(2N) as in GPT-2; norms one."""
        generator = torch.Generator().manual_seed(seed)
        residual_scale = (2 * self.config.num_hidden_layers) ** -0.5
        outputs = ("o_proj.weight", "down_proj.weight", f"compute.{self.config.flex_beta - 1}.weight")
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                scale = residual_scale if name.endswith(outputs) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale, generator=generator)


def no_rows(layer: int, x: Tensor) -> Tensor:
    """For base models, whose layers never ask."""
    raise RuntimeError(f"layer {layer} of a base model asked for a row")


def causal_attention(cos: Tensor, sin: Tensor) -> Attend:
    """Attention of whole sequences [B, S, heads, head_dim] over themselves, positions from 0."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(-3, -2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(-3, -2)

    return attend
