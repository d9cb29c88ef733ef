"""MemoryLLM for Hugging Face's `transformers`: importing this module makes AutoModelForCausalLM open our checkpoints.

The layers are the training form's, so the logits are too. A checkpoint without memory networks, as `tolserve table
export` writes it, takes its rows from the table beside it.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolserve.model.blocks import AddRow, Attend, rotary_tables, rotate
from tolserve.model.checkpoint import Checkpoint
from tolserve.model.config import MODEL_TYPE, ModelConfig
from tolserve.model.presets import preset
from tolserve.model.rows import add_records
from tolserve.model.transformer import Transformer, no_rows
from tolserve.tol.table import Table

try:
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
    from transformers import PretrainedConfig as BaseConfig
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(f"tolserve.model.hf needs `pip install 'tolserve[hf]'`: {error}") from error


class MemoryLLMConfig(BaseConfig):
    """config.json as `transformers` holds it; the fields are ModelConfig's. Without arguments the paper's 250M."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, use_cache: bool = True, **kwargs: Any) -> None:
        shape = {name: kwargs.pop(name, value) for name, value in asdict(preset("250M", "memory")).items()}
        shape["num_key_value_heads"] = shape["num_key_value_heads"] or shape["num_attention_heads"]
        special = {name: shape.pop(name) for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id")}
        super().__init__(**special, **kwargs)
        self.use_cache = use_cache
        for name, value in shape.items():
            setattr(self, name, value)
        self.shape()

    def shape(self) -> ModelConfig:
        """Raises ConfigError for what we do not compute."""
        return ModelConfig.from_dict(vars(self) | {"model_type": MODEL_TYPE})

    def to_diff_dict(self) -> dict[str, Any]:
        """Everything, since other readers of config.json do not know this class's defaults."""
        return self.to_dict()


class MemoryLLMForCausalLM(PreTrainedModel, GenerationMixin):
    """Parameter names are the checkpoint's. `table` gives the rows where there are no memory networks."""

    config_class = MemoryLLMConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: MemoryLLMConfig, with_memory: bool = True) -> None:
        super().__init__(config)
        whole = Transformer(config.shape(), with_memory)
        self.model, self.lm_head = whole.model, whole.lm_head
        # In a tuple, which hides it: as a submodule it would give every parameter a second name.
        self._whole = (whole,)
        self.table: Table | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As everywhere in transformers. A local folder without memory networks must have its table in `tol/`.

        Raises ValueError where a tensor is missing: transformers would go on with random numbers.
        """
        folder = Path(name)
        table = None
        if (folder / "config.json").is_file() and ModelConfig.load(folder).has_memory:
            table = None if Checkpoint(folder).has_memory_weights() else Table.open(folder / "tol")
            kwargs["with_memory"] = table is None
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{name} lacks {len(missing)} tensor(s), first {missing[0]!r}")
        model.table = table
        return (model, info) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """input_ids [B, S] -> logits [B, S, V], or of the last `logits_to_keep` positions.

        attention_mask [B, past + S] is 0 at padding. Raises ValueError for what is not computed here.
        """
        for name in ("inputs_embeds", "output_attentions", "output_hidden_states"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name} is not supported: rows are looked up by token id, and only logits come out")
        if kwargs.pop("return_dict", None) is False:
            raise ValueError("return_dict=False is not supported: the outputs come by name")
        if input_ids is None or (attention_mask is not None and attention_mask.ndim != 2):
            raise ValueError("give input_ids [B, S], and an attention_mask [B, past + S] or none")
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        whole = self._whole[0]
        attend = _attention(whole.config, input_ids, attention_mask, position_ids, past_key_values)
        hidden = whole.hidden(input_ids, attend, self._rows(input_ids))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = whole.logits(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=whole.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _rows(self, tokens: Tensor) -> AddRow:
        whole = self._whole[0]
        if not whole.config.has_memory:
            return no_rows
        return whole.live_rows(tokens) if self.table is None else table_rows(self.table, tokens)


def table_rows(table: Table, tokens: Tensor) -> AddRow:
    """Rows out of a table, whose records are read once per distinct token. Raises RecordError for a damaged one."""
    distinct, inverse = tokens.unique(return_inverse=True)
    add = add_records(table, distinct.tolist(), tokens.device)
    return lambda layer, x: add(layer, x.flatten(0, -2), inverse.flatten()).view_as(x)


def _attention(config: ModelConfig, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, past: Any) -> Attend:
    """Causal attention of tokens [B, S] over a cache and themselves.

    Without padding and behind nothing it is the training form's, to the bit. Raises ValueError for a cache that gives
    back more or fewer keys than there are tokens: the mask would not be theirs.
    """
    seen, length = int(past.get_seq_length()) if past is not None else 0, tokens.shape[1]
    if mask is not None and mask.all():
        mask = None
    if positions is None:
        positions = torch.arange(seen, seen + length, device=tokens.device).unsqueeze(0)
        if mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen:]
    cos, sin = (table[positions] for table in rotary_tables(config, int(positions.max()) + 1, tokens.device))
    visible = None
    if mask is not None or (seen and length > 1):
        here = torch.arange(seen, seen + length, device=tokens.device).unsqueeze(1)
        there = torch.arange(seen + length, device=tokens.device)
        visible = there <= here
        if mask is not None:
            # Padding sees itself, since a softmax over nothing is no number, and would spoil the next layer's values.
            visible = visible & mask.bool()[:, None, None, :] | (there == here)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(-3, -2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        if past is not None:
            k, v = past.update(k, v, layer)
            if k.shape[-2] != seen + length:
                raise ValueError(f"{type(past).__name__} is not supported as past_key_values; give a DynamicCache")
        causal = visible is None and length > 1
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=True)
        return found.transpose(-3, -2)

    return attend


AutoConfig.register(MODEL_TYPE, MemoryLLMConfig)
AutoModelForCausalLM.register(MemoryLLMConfig, MemoryLLMForCausalLM)
