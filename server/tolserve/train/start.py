"""Starting from a LLaMA checkpoint: its attention, norms, embedding and head are taken over (paper eq. 2.6 reads the
same embedding), the feed-forward networks of another variant begin anew."""

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tolserve.model.checkpoint import load_transformer
from tolserve.model.config import FfnVariant, ModelConfig
from tolserve.model.transformer import Transformer
from tolserve.train.recipe import TrainError
from tolserve.train.tokenizer import read_tokenizer

# What the variants do differently, by parts of tensor names.
_FFN = (".mlp.", ".post_attention_layernorm.", ".memory.", ".memory_layernorm.", ".compute.", ".compute_layernorm.")

# What goes along with the weights, where it is there.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def shape_from(model_dir: Path, variant: FfnVariant, beta: int, intermediate_size: int | None) -> ModelConfig:
    """The shape of a model that starts from `model_dir`, as another FFN variant.

    Without `intermediate_size` the FFNs have as many parameters as the checkpoint's: FFN-C's beta * d^2 are taken from
    FFN-M (paper section 4.2). Raises ConfigError where we cannot run the checkpoint, TrainError where nothing is left
    for FFN-M.
    """
    config = ModelConfig.load(model_dir)
    whole = config.intermediate_size + config.flex_beta * config.hidden_size // 3
    size = intermediate_size or whole - beta * config.hidden_size // 3
    if size < 1:
        raise TrainError(f"--flex-beta {beta} leaves no parameters for FFN-M; give --intermediate-size")
    return replace(config, ffn_variant=variant, flex_beta=beta, intermediate_size=size)


def load_tokenizer(model_dir: Path, config: ModelConfig) -> tuple[Tokenizer, int]:
    """The checkpoint's tokenizer, and the token that separates documents: the one that begins a text, else that ends
    one. Raises TrainError where either is missing."""
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise TrainError(f"--init-from {model_dir} holds no tokenizer.json")
    tokenizer = read_tokenizer(path)
    if (size := tokenizer.get_vocab_size()) > config.vocab_size:
        raise TrainError(f"{path} has {size} tokens, but the checkpoint's vocabulary has {config.vocab_size}")
    separator = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    if separator is None:
        raise TrainError(f"{model_dir}/config.json names no bos_token_id or eos_token_id to separate documents by")
    return tokenizer, separator


def load_teacher(model_dir: Path, device: torch.device) -> Transformer:
    """The whole checkpoint, float32, without gradients."""
    return load_transformer(model_dir, with_memory=True, dtype=torch.float32, device=device)


def take_over(model: Transformer, model_dir: Path) -> frozenset[str]:
    """Copy the checkpoint's weights into a model of its shape; returns the names of what was copied.

    Everything is where the variants agree, all but the FFNs where they do not. Raises CheckpointError for a checkpoint
    that lacks a tensor, TrainError for a model of another shape.
    """
    source = load_teacher(model_dir, torch.device("cpu"))
    names = ("ffn_variant", "flex_beta", "intermediate_size")
    same_ffn = all(getattr(source.config, name) == getattr(model.config, name) for name in names)
    given = dict(source.named_parameters())
    taken = frozenset(
        name for name, _ in model.named_parameters() if same_ffn or not any(part in name for part in _FFN)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in taken:
                if name not in given or given[name].shape != parameter.shape:
                    raise TrainError(f"{model_dir} has no {name} of shape {list(parameter.shape)}")
                parameter.copy_(given[name])
    return taken
