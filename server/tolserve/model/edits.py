"""What a pack may hold: rows of another table, rows that count less or more, cells of a network whose value is another.

Each function gives the four tensors of `model.pack.make_entries`: tokens, layers [E] int32, scales [E] float32 and rows
[E, d] float32 or bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tolserve.model.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_names,
    read_copies,
    read_fingerprint,
    tensor_shapes,
)
from tolserve.model.config import ModelConfig
from tolserve.model.networks import MemoryNetworks
from tolserve.model.pack import PackError
from tolserve.model.rows import add_records
from tolserve.tol.table import Table

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def table_rows(table: Table, tokens: Sequence[int], layers: Sequence[int]) -> Tensor:
    """Rows as a step would add them, float32 [tokens, layers, d]; zeros of layers that the table has dropped. Raises
    RecordError."""
    add, slots = add_records(table, tokens), torch.arange(len(tokens))
    return torch.stack([add(layer, torch.zeros(len(tokens), table.manifest.hidden_size), slots) for layer in layers], 1)


def rows_from(source: Path, tokens: Sequence[int], layers: Sequence[int], config: ModelConfig) -> Tensors:
    """Another model's rows instead of one's own; `source` is its table, or its directory with one in tol/ or with
    memory networks. Rows that bf16 holds exactly are stored so.

    Raises PackError for a model of another shape, or one whose table is of other weights, and what reading it raises.
    """
    is_model = (source / "config.json").exists()
    path = source / "tol" if is_model else source
    if path.exists() or not is_model:
        table = Table.open(path)
        if is_model and table.manifest.fingerprint != read_fingerprint(source):
            raise PackError(f"--from {source}: the table in tol/ was built from other weights than lie beside it")
        shape = (table.manifest.vocab_size, table.manifest.num_layers, table.manifest.hidden_size)
        _check_shape(source, shape, config)
        rows = table_rows(table, tokens, layers)
    else:
        other = ModelConfig.load(source)
        _check_shape(source, (other.vocab_size, other.num_hidden_layers, other.hidden_size), config)
        networks = MemoryNetworks(source, tuple(layers))
        rows = torch.stack([networks.rows(layer, tokens) for layer in layers], dim=1).to(torch.bfloat16).float()
    flat = rows.flatten(0, 1)
    rounded = flat.to(torch.bfloat16)
    return (*_grid(tokens, layers), torch.zeros(len(flat)), rounded if torch.equal(rounded.float(), flat) else flat)


def _check_shape(source: Path, shape: tuple[int, int, int], config: ModelConfig) -> None:
    wanted = (config.vocab_size, config.num_hidden_layers, config.hidden_size)
    if shape != wanted:
        names = "tokens, layers and hidden size"
        raise PackError(f"--from {source}: its {names} are {shape}, and the model's {wanted}; they must be the same")


def scaled_rows(tokens: Sequence[int], layers: Sequence[int], scale: float, hidden_size: int) -> Tensors:
    """The tokens' rows times a number; 0 suppresses them."""
    count = len(tokens) * len(layers)
    return (*_grid(tokens, layers), torch.full((count,), scale), torch.zeros(count, hidden_size, dtype=torch.bfloat16))


def _grid(tokens: Sequence[int], layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    pairs = torch.tensor([(token, layer) for token in tokens for layer in layers], dtype=torch.int32)
    return pairs[:, 0], pairs[:, 1]


@dataclass(frozen=True)
class Cell:
    """A memory cell of one layer (paper eq. 2.7-2.8): its coefficient for each token [V] and its value [d], float32."""

    layer: int
    coefficients: Tensor
    value: Tensor

    @classmethod
    def read(cls, model_dir: Path, layer: int, cell: int) -> "Cell":
        """Raises PackError for a cell that does not exist, CheckpointError for a model without memory networks."""
        config = ModelConfig.load(model_dir)
        checkpoint = Checkpoint(model_dir)
        if not checkpoint.has_memory_weights():
            raise CheckpointError(f"{model_dir} has no memory tensors; --cell reads those behind its table")
        check_names(tensor_shapes(config, with_memory=True), checkpoint, skip_memory=False)
        if not (0 <= layer < config.num_hidden_layers and 0 <= cell < config.intermediate_size):
            raise PackError(
                f"--layer {layer} --cell {cell}: the model has layers 0 to {config.num_hidden_layers - 1} with cells 0 "
                f"to {config.intermediate_size - 1} each"
            )
        name = f"model.layers.{layer}.memory"
        names = [f"{name}_layernorm.weight", *(f"{name}.{part}_proj.weight" for part in ("gate", "up", "down"))]
        embedding, norm, gate, up, down = read_copies(model_dir, ["model.embed_tokens.weight", *names])
        query = F.rms_norm(embedding.float(), norm.shape, norm.float(), config.rms_norm_eps)
        coefficients = (query @ up[cell].float()) * F.silu(query @ gate[cell].float())
        return cls(layer, coefficients, down[:, cell].float().clone())

    def strongest(self, share: float) -> list[int]:
        """The tokens whose coefficient is at least this share of the largest, by size; none of a cell that is 0 for
        all."""
        size = self.coefficients.abs()
        return torch.nonzero((size >= share * size.max()) & (size > 0)).flatten().tolist()

    def edit(self, tokens: Sequence[int], times: float, direction: Tensor | None = None) -> Tensors:
        """The cell counts `times` as much for these tokens, its value replaced by `direction` [d] at the value's own
        length where one is given."""
        value = self.value
        if direction is not None:
            value = direction.float() * (self.value.norm() / direction.float().norm().clamp(min=1e-12))
        own = self.coefficients[torch.tensor(tokens, dtype=torch.int64)].unsqueeze(1)
        rows = own * (times * value - self.value)
        return (*_grid(tokens, [self.layer]), torch.ones(len(rows)), rows)


def embedding_of(model_dir: Path, token: int) -> Tensor:
    """A token's embedding [d], in the checkpoint's precision."""
    (embedding,) = read_copies(model_dir, ["model.embed_tokens.weight"])
    return embedding[token]
