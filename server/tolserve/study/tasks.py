"""The measures that studies share: perplexity on texts and BLiMP by groups, read once and scored many times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tolserve.study.blimp import Pairs, accuracies, by_group, by_phenomenon, grouping, read_pairs
from tolserve.study.evaluate import Rows, Scale, Studied, load, loss_of, perplexity_of, read_text
from tolserve.study.report import Study, StudyError, provenance
from tolserve.train.evaluate import HeldOut

# Of a window, where no length is given. A context of a hundred thousand tokens is not what a study is after.
_LONGEST = 1024


@dataclass(frozen=True)
class Tasks:
    """What to measure: `texts` in windows of `length` tokens (None: 1,024, or the smallest context of the models that
    are measured together), about `tokens` of each (None: all); and BLiMP's zip with `pairs` of each paradigm, or
    None."""

    texts: tuple[Path, ...]
    tokens: int | None = None
    length: int | None = None
    blimp: Path | None = None
    pairs: int = 200

    def __post_init__(self) -> None:
        if not self.texts and self.blimp is None:
            raise StudyError("nothing to measure: give --text, --blimp or both")
        names = [text_name(path) for path in self.texts]
        if len(set(names)) < len(names):
            raise StudyError(f"two texts are called the same: {', '.join(names)}; rename one, a column has one name")

    def read(self, studied: Studied) -> "Reading":
        """Raises StudyError, DataError."""
        length, context = self.length_for([studied]), studied.config.max_position_embeddings
        if not 1 <= length <= context:
            raise StudyError(f"--length {length}: {studied.name} takes 1 to {context}")
        texts = {text_name(path): read_text(studied, path, self.tokens, length) for path in self.texts}
        pairs = read_pairs(studied, self.blimp, self.pairs) if self.blimp is not None else None
        return Reading(studied, texts, length, pairs)

    def facts(self) -> dict[str, Any]:
        """What a reader of the scores must know and the models do not say."""
        return {"blimp_groups": grouping()} if self.blimp is not None else {}

    def length_for(self, models: Sequence[Studied]) -> int:
        """Tokens of a window: the same for all of `models`, since a longer one predicts better."""
        if self.length is not None:
            return self.length
        return min(_LONGEST, *(studied.config.max_position_embeddings for studied in models))


@dataclass(frozen=True)
class Scores:
    """`columns` for a table: a perplexity a text, BLiMP's accuracy by group; `detail`: by phenomenon and paradigm."""

    columns: dict[str, float]
    detail: dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """A model with its tasks tokenised."""

    studied: Studied
    texts: Mapping[str, HeldOut]
    length: int
    pairs: Pairs | None

    def score(self, rows: Rows | None = None, scale: Scale = 1.0) -> Scores:
        """With other rows or scaled feed-forward outputs, as in `Forward`."""
        columns: dict[str, float] = {}
        detail: dict[str, Any] = {}
        for name, text in self.texts.items():
            loss = loss_of(self.studied, text, self.length, rows, scale)
            columns[f"ppl {name}"] = perplexity_of(loss)
            detail[name] = {"nats_per_token": loss.nats_per_token, "bits_per_byte": loss.bits_per_byte}
        if self.pairs is not None:
            accuracy = accuracies(self.studied, self.pairs, rows, scale)
            columns |= {f"blimp {group}": share for group, share in by_group(self.pairs, accuracy).items()}
            detail["blimp"] = {"phenomena": by_phenomenon(self.pairs, accuracy), "paradigms": accuracy}
        return Scores(columns, detail)

    def facts(self) -> dict[str, Any]:
        """The model and the scale of what was measured."""
        tokens = {name: sum(len(document) - 1 for document in text.documents) for name, text in self.texts.items()}
        pairs = {"blimp_pairs": len(self.pairs)} if self.pairs is not None else {}
        return self.studied.facts() | {"tokens": tokens, "length": self.length} | pairs


def read_models(models: Sequence[Path], tasks: Tasks) -> dict[str, Reading]:
    """By name: each folder's own, with as many of those above as it takes to tell them apart. Raises StudyError, and
    what `load` and `Tasks.read` raise."""
    parts = [path.resolve().parts for path in models]
    if not parts or len(set(parts)) < len(parts):
        raise StudyError("name at least one model, and each once")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    studied = {"/".join(part[-depth:]): load(path) for part, path in zip(parts, models, strict=True)}
    alike = replace(tasks, length=tasks.length_for(list(studied.values())))
    return {name: alike.read(model) for name, model in studied.items()}


@dataclass
class Results:
    """Rows and details of a study as they come, and what is made of them at the end."""

    tasks: Tasks
    readings: dict[str, Reading]
    rows: list[dict[str, Any]]
    details: list[dict[str, Any]]

    @classmethod
    def of(cls, models: Sequence[Path], tasks: Tasks) -> "Results":
        return cls(tasks, read_models(models, tasks), [], [])

    def add(self, case: dict[str, Any], scores: Scores, **further: Any) -> None:
        """`case` says what was measured; it begins the table's row and the details'."""
        self.rows.append({**case, **scores.columns, **further})
        self.details.append({**case, **scores.detail})

    def study(self, name: str, **extra: Any) -> Study:
        models = [{"name": name, **reading.facts()} for name, reading in self.readings.items()]
        return Study(
            name, {"models": models} | self.tasks.facts() | provenance(), self.rows, {**extra, "scores": self.details}
        )


def text_name(path: Path) -> str:
    """`heldout` of `runs/data/heldout.jsonl.gz`."""
    return path.name.split(".")[0]


def quiet(done: int, total: int) -> None:
    """A progress that is shown to nobody."""
