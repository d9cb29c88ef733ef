"""A pruned base model beside memory and flex models of as many active parameters (paper Fig. 11).

Active are the weights of a forward pass that are not zero, without embedding and head. A memory or flex model's memory
networks do not count, since a server looks their rows up; every zero of a pruned matrix is taken to be free.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tolserve.study.evaluate import Studied
from tolserve.study.pictures import logarithmic, measures, panels
from tolserve.study.report import Study, StudyError
from tolserve.study.sparse import METHODS, Method, active_parameters, prune, share_to_keep
from tolserve.study.tasks import Results, Tasks, quiet
from tolserve.train.data import read_documents

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Characters read for each token wanted: English takes 3 to 5 in vocabularies of 4,096 to 128,256.
_CHARACTERS = 12


@dataclass(frozen=True)
class Calibration:
    """The text that Wanda and SparseGPT see, which should not be one that is measured; and how many windows of it."""

    text: Path
    sequences: int = 32

    def read(self, studied: Studied, length: int) -> Tensor:
        """[sequences, length] int64: the middle of each of the file's first documents that are long enough.

        Raises DataError for a file that cannot be read, StudyError where it has too few such documents.
        """
        found: list[list[int]] = []
        for text in read_documents(self.text):
            start = max(0, len(text) - _CHARACTERS * length) // 2
            ids = studied.tokenizer.encode(text[start : start + _CHARACTERS * length], add_special_tokens=False).ids
            if len(ids) >= length:
                found.append(ids[:length])
            if len(found) == self.sequences:
                return torch.tensor(found)
        raise StudyError(
            f"{self.text} has {len(found)} documents of {length} tokens; {self.sequences} are asked for calibration"
        )


def run(
    models: Sequence[Path],
    tasks: Tasks,
    calibration: Calibration,
    methods: Sequence[Method] = METHODS,
    progress: Callable[[int, int], None] = quiet,
) -> Study:
    """Prune the first of `models`, a base model, to the active parameters of each other one, and measure all of them.

    Raises what `load` and `Tasks.read` raise, DataError, and StudyError where the first is no base model or not larger
    than each other one, or where the others' tokenizers are not its own: their perplexities do not compare.
    """
    results = Results.of(models, tasks)
    (name, base), *others = results.readings.items()
    whole = base.studied
    if whole.config.has_memory:
        raise StudyError(f"{name} is a {whole.config.ffn_variant} model; name the base model that is pruned first")
    for other, reading in others:
        if reading.studied.tokenizer.get_vocab() != whole.tokenizer.get_vocab():
            raise StudyError(f"{other} has another tokenizer than {name}; their perplexities do not compare")
    targets = sorted({active_parameters(reading.studied.model) for _, reading in others})
    if not targets:
        raise StudyError("name at least one model beside the base model, whose active parameters it is pruned to")
    shares = [share_to_keep(whole.model, target) for target in targets]
    samples = calibration.read(whole, base.length)
    total = len(models) + len(targets) * len(methods)
    for other, reading in results.readings.items():
        progress(len(results.rows), total)
        active = active_parameters(reading.studied.model)
        results.add({"model": other, "pruned": "no", "active": active}, reading.score())
    for share in shares:
        for method in methods:
            progress(len(results.rows), total)
            pruned = replace(whole, model=prune(whole.model, method, share, samples))
            case = {"model": name, "pruned": method, "active": active_parameters(pruned.model)}
            results.add(case, replace(base, studied=pruned).score())
    progress(total, total)
    return results.study("prune", calibration={"text": calibration.text.name, "tokens": samples.numel()})


def draw(study: Study, figure: "Figure") -> None:
    """A panel per measure over active parameters: a line for each pruning method, a star for each model as it is."""
    whole, titles = study.rows[0], measures(study.rows[0])
    for axes, title in zip(panels(figure, titles), titles, strict=True):
        for method in dict.fromkeys(row["pruned"] for row in study.rows if row["pruned"] != "no"):
            line = sorted((row["active"], row[title]) for row in study.rows if row is whole or row["pruned"] == method)
            axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=method)
        for row in study.rows:
            if row["pruned"] == "no":
                axes.plot(row["active"], row[title], "*", markersize=9, label=row["model"])
        axes.set_xlabel("active parameters")
        if title.startswith("ppl "):
            logarithmic(axes)
        axes.legend(fontsize=8)
