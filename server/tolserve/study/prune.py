"""A pruned base model beside memory and flex models of as many active parameters (paper Fig. 11).

Active are the weights of a forward pass that are not zero, without embedding and head. A memory or flex model's memory
networks do not count, since a server looks their rows up; every zero of a pruned matrix is taken to be free.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tolserve.study.blimp import Pairs, accuracies, read_pairs
from tolserve.study.evaluate import Studied, load, loss_of, perplexity_of, read_text
from tolserve.study.report import Study, StudyError, provenance
from tolserve.study.sparse import Method, active_parameters, prune, share_to_keep
from tolserve.train.data import read_documents
from tolserve.train.evaluate import HeldOut

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS: tuple[Method, ...] = ("magnitude", "wanda", "sparsegpt")
# Characters read for each token wanted: English takes 3 to 5 in vocabularies of 4,096 to 128,256.
_CHARACTERS = 12


def calibration_sequences(studied: Studied, path: Path, sequences: int, length: int) -> Tensor:
    """[sequences, length] int64: the middle of each of a file's first documents that are long enough.

    Raises DataError for a file that cannot be read, StudyError where it has too few such documents.
    """
    found: list[list[int]] = []
    for text in read_documents(path):
        start = max(0, len(text) - _CHARACTERS * length) // 2
        ids = studied.tokenizer.encode(text[start : start + _CHARACTERS * length], add_special_tokens=False).ids
        if len(ids) >= length:
            found.append(ids[:length])
        if len(found) == sequences:
            return torch.tensor(found)
    raise StudyError(f"{path} has {len(found)} documents of {length} tokens; {sequences} are asked for calibration")


def run(
    base: Path,
    against: Sequence[Path],
    *,
    text: Path,
    calibration: Path,
    methods: Sequence[Method] = METHODS,
    tokens: int | None = None,
    length: int = 1024,
    sequences: int = 32,
    blimp_zip: Path | None = None,
    pairs: int = 100,
) -> Study:
    """Prune `base` to the active parameters of each model `against` and score all of them.

    `text` is scored (about `tokens` of it), `calibration` is what Wanda and SparseGPT see: `sequences` of `length`
    tokens. Raises DataError, ConfigError, CheckpointError; StudyError too where `base` is no base model,
    is not larger than a model `against`, or has another tokenizer, whose perplexity could not be compared.
    """
    whole = load(base)
    if whole.config.has_memory:
        raise StudyError(f"{base} is a {whole.config.ffn_variant} model; --against is where that belongs")
    length = min(length, whole.config.max_position_embeddings)
    held_out = read_text(whole, text, tokens)
    samples = calibration_sequences(whole, calibration, sequences, length)
    score = Scorer(held_out, length, read_pairs(whole, blimp_zip, pairs) if blimp_zip is not None else None)
    rows = [score.row(whole, "none")]
    targets: list[int] = []
    for path in against:
        other = load(path)
        if other.tokenizer.get_vocab() != whole.tokenizer.get_vocab():
            raise StudyError(f"{path} has another tokenizer than {base}; their perplexities do not compare")
        rows.append(score.row(other, "none"))
        targets.append(active_parameters(other.model))
    for target in sorted(set(targets)):
        keep = share_to_keep(whole.model, target)
        for method in methods:
            rows.append(score.row(replace(whole, model=prune(whole.model, method, keep, samples)), method))
    counted = {"text": text.name, "calibration": calibration.name, "calibration_tokens": samples.numel()}
    scored = {"length": length, "blimp_pairs_per_paradigm": pairs if blimp_zip else None}
    return Study("prune", whole.facts() | counted | scored | provenance(), rows)


@dataclass(frozen=True)
class Scorer:
    """One text and one set of BLiMP pairs for every model of the study."""

    text: HeldOut
    length: int
    pairs: Pairs | None

    def row(self, studied: Studied, method: str) -> dict[str, Any]:
        loss = loss_of(studied, self.text, min(self.length, studied.config.max_position_embeddings))
        found = accuracies(studied, self.pairs) if self.pairs is not None else None
        return {
            "model": studied.name,
            "pruned": method,
            "active": active_parameters(studied.model),
            "perplexity": perplexity_of(loss),
            "bits_per_byte": loss.bits_per_byte,
            "tokens": loss.tokens,
            "blimp": fmean(found.values()) if found is not None else None,
        }


def draw(study: Study, figure: "Figure") -> None:
    """Perplexity against active parameters: a line for each pruning method, a point for each model as it is."""
    axes = figure.subplots()
    whole = study.rows[0]
    for method in METHODS:
        line = [whole, *(row for row in study.rows if row["pruned"] == method)]
        if len(line) > 1:
            line.sort(key=lambda row: row["active"])
            places, heights = [row["active"] for row in line], [row["perplexity"] for row in line]
            axes.plot(places, heights, marker="o", label=f"{whole['model']}, {method}")
    for row in study.rows:
        if row["pruned"] == "none":
            axes.plot(row["active"], row["perplexity"], "k*")
            axes.annotate(row["model"], (row["active"], row["perplexity"]), (4, 4), textcoords="offset points")
    axes.set(xlabel="active parameters (without embeddings)", ylabel="perplexity", yscale="log")
    axes.legend()
