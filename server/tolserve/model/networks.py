"""The memory networks of a checkpoint, run over the vocabulary without a model around them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tolserve.model.blocks import Layer
from tolserve.model.checkpoint import Checkpoint, CheckpointError, check_names, read_copies, tensor_shapes
from tolserve.model.config import ModelConfig

# Tokens per call. A layer's weights are converted to float32 once per call, a share of the time that falls with their
# number; memory grows with it. At 24 layers of 2048 x 5464, 2,048 tokens took 0.66 GB beside the weights, measured, and
# matrix products 86% of the processor's time, at their full rate.
TOKENS_PER_BATCH = 2048


class MemoryNetworks:
    """Embedding and memory networks of the layers asked for, in RAM in the checkpoint's precision.

    They are run in float32, one layer at a time, in one scratch layer. Raises CheckpointError for a model that has
    none, or whose tensors are not those that its config describes.
    """

    def __init__(self, model_dir: Path, layers: tuple[int, ...]) -> None:
        self.config = ModelConfig.load(model_dir)
        checkpoint = Checkpoint(model_dir)
        if not self.config.has_memory:
            raise CheckpointError(f"{model_dir} is a base model: its FFNs read the residual stream and have no table")
        if not checkpoint.has_memory_weights():
            raise CheckpointError(f"{model_dir} has no memory tensors to build a table from")
        with torch.device("meta"):
            layer = Layer(self.config, with_memory=True)
        check_names(tensor_shapes(self.config, with_memory=True), checkpoint, skip_memory=False)
        (self._embedding,) = read_copies(model_dir, ["model.embed_tokens.weight"])
        self._scratch = layer
        self._scratch.memory.to_empty(device="cpu")
        self._scratch.memory_layernorm.to_empty(device="cpu")
        used = [name for name, parameter in layer.named_parameters() if not parameter.is_meta]
        self._weights = {
            index: read_copies(model_dir, [f"model.layers.{index}.{name}" for name in used]) for index in layers
        }

    def batches(self) -> Iterator[range]:
        """All token ids in order."""
        for start in range(0, self.config.vocab_size, TOKENS_PER_BATCH):
            yield range(start, min(start + TOKENS_PER_BATCH, self.config.vocab_size))

    @torch.inference_mode()
    def rows(self, layer: int, tokens: Sequence[int]) -> Tensor:
        """The layer's rows of these tokens, float32 [n, hidden_size]."""
        used = (parameter for parameter in self._scratch.parameters() if not parameter.is_meta)
        for parameter, weight in zip(used, self._weights[layer], strict=True):
            parameter.copy_(weight)
        return self._scratch.memory_row(self._embedding[torch.tensor(tokens)].float())
