"""The memory networks read as tokens, keys and values (paper section 3, eq. 2.7-2.8, Fig. 5 and 6).

A token's query is `q = norm_L(embedding)`. Cell i of layer L answers with the coefficient
`c_i = (q . up_i) * silu(q . gate_i)`, and the token's row is the sum of `c_i * v_i`, v_i being column i of the down
projection. Queries are the vocabulary, so the coefficients are a finite table, computed here in chunks.

The paper gives no formula for its clustering coefficient or its outliers. Ours are `clustering_coefficient` and
`outliers_per_token`, and likeness of two tokens is always the cosine of their coefficients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tolserve.model.transformer import Transformer
from tolserve.study.evaluate import Studied, load
from tolserve.study.report import Study, StudyError, provenance, require
from tolserve.study.tasks import quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Projection = Literal["tsne", "pca"]

# Tokens whose coefficients are computed at once: 90 MB of them at K = 5,464, beside gate and up of the same size.
CHUNK = 4096
# Neighbours that count for the clustering coefficient: a word's inflections and spellings, 5 to 20 tokens. It has to
# stay well below a cluster's size.
NEIGHBOURS = 10
# A normal variable is beyond 6 standard deviations twice in 10^9, so none of a million cells would be by chance.
OUTLIER_SIGMAS = 6.0
# Tokens that a cluster, a token's neighbourhood or a cell is shown by.
SHOWN = 12
# Shuffled coefficients have no clusters to converge to.
K_MEANS_ROUNDS = 100
# t-SNE searches neighbours in all columns; the 50 main directions are what its authors advise to give it.
TSNE_INPUTS = 50


def coefficients(model: Transformer, layer: int, tokens: Tensor) -> Tensor:
    """c of `tokens` [n] int64 at a layer: [n, K] in the model's dtype. The model is in training form."""
    block = model.model.layers[layer]
    query = block.memory_layernorm(model.model.embed_tokens(tokens))
    return F.silu(block.memory.gate_proj(query)) * block.memory.up_proj(query)


def values(model: Transformer, layer: int) -> Tensor:
    """v of a layer, [K, d]: `coefficients @ values` are the tokens' rows."""
    return model.model.layers[layer].memory.down_proj.weight.T


def vocabulary_chunks(model: Transformer) -> Iterator[Tensor]:
    """All token ids in order, int64, `CHUNK` at a time."""
    return iter(torch.arange(model.config.vocab_size).split(CHUNK))


def sample_tokens(vocab_size: int, sample: int, seed: int) -> Tensor:
    """`sample` different token ids, sorted; all of them where there are no more."""
    if sample >= vocab_size:
        return torch.arange(vocab_size)
    return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:sample].sort().values


def sampled_coefficients(model: Transformer, layer: int, tokens: Tensor) -> Floats:
    """`coefficients` of many tokens, float32 [n, K], without intermediate results of more than a chunk."""
    return torch.cat([coefficients(model, layer, part).float() for part in tokens.split(CHUNK)]).numpy()


def unit(c: Floats) -> Floats:
    """Rows scaled to length 1, so that Euclidean distance orders as the cosine does; a row of zeros stays."""
    norms = np.linalg.norm(c, axis=1, keepdims=True)
    return c / np.maximum(norms, np.finfo(np.float32).tiny)


def outliers_per_token(c: Floats) -> float:
    """Mean number of a token's coefficients that lie beyond `OUTLIER_SIGMAS` standard deviations of all of c [n, K].

    The standard deviation is the layer's own, over tokens and cells, about zero: layers differ in scale.
    """
    sigma = float(np.sqrt(np.mean(np.square(c), dtype=np.float64)))
    return float((np.abs(c) > OUTLIER_SIGMAS * sigma).sum() / len(c))


def clustering_coefficient(points: Floats, labels: Integers, neighbours: int = NEIGHBOURS) -> float:
    """How far clusters hold neighbours together: the mean share of a token's nearest neighbours in its own cluster.

    points [n, K] of unit length, labels [n]. 1 where no cluster cuts a neighbourhood. Chance is the sum of the squared
    shares of the clusters; a few strong cells raise it as well, so a figure needs that of `shuffled` beside it.

    Chosen over Watts and Strogatz' coefficient of the same neighbour graph after a measurement on the demo model's
    layer 0: that one is 0.27 and 0.28 for the shuffled (hubs, near to everyone, close triangles), this 0.66 and 0.47.
    """
    from sklearn.neighbors import NearestNeighbors

    searched = NearestNeighbors(n_neighbors=min(neighbours, len(points) - 1)).fit(points)
    nearest = searched.kneighbors(return_distance=False)
    return float((labels[nearest] == labels[:, None]).mean())


def shuffled(c: Floats, seed: int) -> Floats:
    """c with every cell's coefficients dealt to other tokens: the same cells, no token that means anything."""
    return np.random.default_rng(seed).permuted(c, axis=0)


@dataclass(frozen=True)
class Clusters:
    """`labels` [n] by token of the sample; `central` per cluster: positions in the sample, most central first."""

    labels: Integers
    central: list[Integers]


def find_clusters(points: Floats, clusters: int, seed: int) -> Clusters:
    """K-means on points [n, K] of unit length; the largest cluster is number 0. Raises StudyError for too many."""
    from sklearn.cluster import KMeans

    if clusters > len(points):
        raise StudyError(f"--clusters {clusters}: the sample has {len(points)} tokens")
    means = KMeans(clusters, n_init=1, max_iter=K_MEANS_ROUNDS, random_state=seed).fit(points)
    order = np.argsort(-np.bincount(means.labels_, minlength=clusters), kind="stable")
    labels = np.argsort(order)[means.labels_]
    distance = np.linalg.norm(points - means.cluster_centers_[means.labels_], axis=1)
    members = [np.flatnonzero(labels == cluster) for cluster in range(clusters)]
    return Clusters(labels, [inside[np.argsort(distance[inside], kind="stable")] for inside in members])


def project(points: Floats, method: Projection, seed: int) -> Floats:
    """points [n, K] -> [n, 2]. `pca` takes seconds where `tsne` takes a minute (8,192 tokens)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    directions = 2 if method == "pca" else min(TSNE_INPUTS, *points.shape)
    main: Floats = PCA(directions, random_state=seed).fit_transform(points)
    if method == "pca":
        return main
    perplexity = min(30.0, (len(points) - 1) / 3)
    placed: Floats = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(main)
    return placed


def nearest_tokens(model: Transformer, layer: int, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each of `tokens` [n]: the `count` other tokens of the whole vocabulary whose coefficients are most alike.

    Returns cosines and ids, both [n, count], the nearest first.
    """
    asked = F.normalize(coefficients(model, layer, tokens), dim=-1)
    parts = [asked @ F.normalize(coefficients(model, layer, part), dim=-1).T for part in vocabulary_chunks(model)]
    cosines = torch.cat(parts, dim=-1).scatter(1, tokens.unsqueeze(1), -torch.inf)
    best = cosines.topk(min(count, cosines.shape[1] - 1), dim=-1)
    return best.values, best.indices


def strongest_cells(model: Transformer, layer: int, c: Floats, count: int) -> list[int]:
    """The cells that move the rows of the sample c [n, K] most: largest mean |c_i| times the length of v_i."""
    strength = torch.from_numpy(np.abs(c).mean(axis=0)) * values(model, layer).float().norm(dim=-1)
    return [int(cell) for cell in strength.topk(min(count, len(strength))).indices]


@dataclass(frozen=True)
class Cell:
    """One cell read: pairs of token id and number, the strongest first.

    `promotes` and `suppresses` are logits that a coefficient of 1 adds by the direct path: v_i through the final
    norm's weight and the output head; the norm's scale and what later layers make of v_i are left out. `excited_by`
    are the tokens with the largest |c_i|, with their c_i: where it is negative, the cell does the reverse.
    """

    layer: int
    cell: int
    promotes: list[tuple[int, float]]
    suppresses: list[tuple[int, float]]
    excited_by: list[tuple[int, float]]


def read_cells(model: Transformer, layer: int, cells: list[int], count: int) -> list[Cell]:
    """What cells say and who asks them."""
    logits = model.logits(values(model, layer)[cells] * model.model.norm.weight)
    asked = torch.cat([coefficients(model, layer, part)[:, cells] for part in vocabulary_chunks(model)]).T
    read = []
    for cell, promoted, c in zip(cells, logits, asked, strict=True):
        up, down, excited = (_strongest(by, count) for by in (promoted, -promoted, c.abs()))
        read.append(Cell(layer, cell, _pairs(promoted, up), _pairs(promoted, down), _pairs(c, excited)))
    return read


def _strongest(by: Tensor, count: int) -> list[int]:
    return [int(token) for token in by.topk(min(count, len(by))).indices]


def _pairs(numbers: Tensor, tokens: list[int]) -> list[tuple[int, float]]:
    return [(token, float(numbers[token])) for token in tokens]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as people can read it; one that is no whole character by the name that the tokenizer has for it."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    return text if text and "\ufffd" not in text else tokenizer.id_to_token(token) or f"<{token}>"


def token_of(tokenizer: Tokenizer, text: str) -> int:
    """The id of a text that is one token. Raises StudyError that says what the text splits into."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) == 1:
        return int(ids[0])
    parts = ", ".join(repr(token_text(tokenizer, token)) for token in ids)
    raise StudyError(f"--token {text!r} is {len(ids)} tokens ({parts or 'none'}); give one, often ' {text}'")


def run(
    model: Path,
    *,
    layer: int = 0,
    clusters: int = 32,
    tokens: Sequence[str] = (),
    cells: Sequence[int] = (),
    sample: int = 4096,
    projection: Projection = "tsne",
    seed: int = 0,
    progress: Callable[[int, int], None] = quiet,
) -> Study:
    """Every layer's clustering and outliers; and of one `layer` its clusters, the neighbours of `tokens`, and `cells`,
    or the strongest ones where none are named.

    `sample` tokens stand for the vocabulary in clusters, projection and the figures per layer, and bound what is held:
    4 * sample * K bytes, a few times. Neighbours and what excites a cell are searched in the whole vocabulary.
    Raises StudyError, ConfigError, CheckpointError.
    """
    require("sklearn")
    studied = load(model)
    if not studied.config.has_memory:
        raise StudyError(f"{model} is a base model: its FFNs read the residual stream, so no token has coefficients")
    if not 0 <= layer < studied.config.num_hidden_layers:
        raise StudyError(f"--layer {layer}: the model has layers 0 to {studied.config.num_hidden_layers - 1}")
    width = studied.config.intermediate_size
    if wrong := [cell for cell in cells if not 0 <= cell < width]:
        raise StudyError(f"--cells {wrong[0]}: the layers have cells 0 to {width - 1}")
    network = studied.model
    asked = torch.tensor([token_of(studied.tokenizer, text) for text in tokens], dtype=torch.int64)
    ids = sample_tokens(studied.config.vocab_size, sample, seed)
    rows = []
    for index in range(studied.config.num_hidden_layers):
        progress(index, studied.config.num_hidden_layers + 1)
        rows.append(_layer_figures(network, index, ids, clusters, seed))
    progress(len(rows), len(rows) + 1)
    c = sampled_coefficients(network, layer, ids)
    points = unit(c)
    found = find_clusters(points, clusters, seed)
    chosen = list(cells) or strongest_cells(network, layer, c, SHOWN)
    extra = {
        "layer": layer,
        "clusters": _named_clusters(studied.tokenizer, ids, found),
        "neighbours": _named_neighbours(studied, layer, asked) if len(asked) else [],
        "cells": [_named_cell(studied.tokenizer, cell) for cell in read_cells(network, layer, chosen, SHOWN)],
        "projection": {
            "method": projection,
            "tokens": ids.tolist(),
            "places": project(points, projection, seed).round(3).tolist(),
            "clusters": found.labels.tolist(),
        },
    }
    chose = {"sample": len(ids), "clusters": clusters, "neighbours": NEIGHBOURS, "outlier_sigmas": OUTLIER_SIGMAS}
    progress(len(rows) + 1, len(rows) + 1)
    return Study("tkv", studied.facts() | chose | provenance(seed), rows, extra, list(_lines(extra)))


def _layer_figures(model: Transformer, layer: int, ids: Tensor, clusters: int, seed: int) -> dict[str, Any]:
    c = sampled_coefficients(model, layer, ids)
    real, dealt = unit(c), unit(shuffled(c, seed))
    of_real, of_dealt = (clustering_coefficient(of, find_clusters(of, clusters, seed).labels) for of in (real, dealt))
    outliers = outliers_per_token(c)
    return {"layer": layer, "clustering": of_real, "clustering_shuffled": of_dealt, "outliers_per_token": outliers}


def _named_clusters(tokenizer: Tokenizer, ids: Tensor, found: Clusters) -> list[dict[str, Any]]:
    shown = ([token_text(tokenizer, int(ids[at])) for at in central[:SHOWN]] for central in found.central)
    return [{"size": len(at), "central": texts} for at, texts in zip(found.central, shown, strict=True)]


def _named_neighbours(studied: Studied, layer: int, asked: Tensor) -> list[dict[str, Any]]:
    named = []
    for token, cosines, ids in zip(asked, *nearest_tokens(studied.model, layer, asked, SHOWN), strict=True):
        near = [(token_text(studied.tokenizer, int(t)), float(cosine)) for t, cosine in zip(ids, cosines, strict=True)]
        named.append({"token": token_text(studied.tokenizer, int(token)), "nearest": near})
    return named


def _named_cell(tokenizer: Tokenizer, cell: Cell) -> dict[str, Any]:
    read = asdict(cell)
    for key in ("promotes", "suppresses", "excited_by"):
        read[key] = [(token_text(tokenizer, token), number) for token, number in read[key]]
    return read


def _lines(extra: dict[str, Any]) -> Iterator[str]:
    """Clusters, neighbours and cells as people read them."""
    layer = extra["layer"]
    for number, cluster in enumerate(extra["clusters"]):
        yield f"layer {layer}, cluster {number} of {cluster['size']} tokens: {_texts(cluster['central'])}"
    for found in extra["neighbours"]:
        yield f"layer {layer}, nearest to {found['token']!r}: {_texts(text for text, _ in found['nearest'])}"
    for cell in extra["cells"]:
        excited = ", ".join(f"{text!r} {c:.1f}" for text, c in cell["excited_by"])
        promotes, suppresses = (_texts(text for text, _ in cell[key]) for key in ("promotes", "suppresses"))
        yield f"layer {layer}, cell {cell['cell']}: asked by {excited}; promotes {promotes}; suppresses {suppresses}"


def _texts(texts: Iterable[str]) -> str:
    return " ".join(map(repr, texts))


def draw(study: Study, figure: "Figure") -> None:
    """The projection coloured by cluster, each named by their most central token; clustering and outliers
    by layer."""
    figure.set_size_inches(15, 5)
    placed, clustering, outliers = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    projection = study.extra["projection"]
    places, labels = np.array(projection["places"]), np.array(projection["clusters"])
    placed.scatter(*places.T, c=labels, s=3, cmap="gist_ncar")
    for label, cluster in enumerate(study.extra["clusters"]):
        name = ascii(cluster["central"][0])  # a font has not every script's letters; and "$" would begin a formula
        placed.annotate(name, np.median(places[labels == label], axis=0), fontsize=7, parse_math=False)
    placed.set(xticks=[], yticks=[], title=f"layer {study.extra['layer']}, {projection['method']}")
    layers = [row["layer"] for row in study.rows]
    clustering.plot(layers, [row["clustering"] for row in study.rows], marker="o", label="as it is")
    clustering.plot(layers, [row["clustering_shuffled"] for row in study.rows], marker="o", label="cells shuffled")
    clustering.set(xlabel="layer", title="neighbours in one cluster", ylim=(0, 1))
    clustering.legend()
    counts = [row["outliers_per_token"] for row in study.rows]
    outliers.plot(layers, counts, marker="o")
    outliers.set(xlabel="layer", title="outliers per token", ylim=(0, 1.1 * max(counts) or 1))
