"""BLiMP: does the model find the grammatical one of two sentences likelier (Warstadt et al. 2020, 67 paradigms)?

The file is the benchmark's own zip: one .jsonl a paradigm, each line with `sentence_good`, `sentence_bad`, `UID` and
`linguistics_term`. A sentence's score is the sum of the log-probabilities of all its tokens behind the separator, with
no token for its end; the pair counts if the good one's is higher.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from tolserve.study.evaluate import Forward, Rows, Scale, Studied
from tolserve.study.report import StudyError
from tolserve.train.data import Tokens
from tolserve.train.evaluate import batch_values, rectangles

Group = Literal["recall", "structure"]


@dataclass(frozen=True)
class Phenomenon:
    group: Group
    reason: str


# By the files' `linguistics_term`. Recall: the pair differs in what one word is or takes, so whoever remembers that
# word's facts decides it, nearly without the rest of the sentence. Structure: the same words, or words of the same
# kind, are in both sentences, and where they stand to each other decides.
PHENOMENA: dict[str, Phenomenon] = {
    "irregular_forms": Phenomenon("recall", "which form of one irregular verb is its past tense, which its participle"),
    "determiner_noun_agreement": Phenomenon(
        "recall", "whether a noun's form is singular or plural, irregular ones too; its determiner stands beside it"
    ),
    "anaphor_agreement": Phenomenon("recall", "the gender of a name or noun, and its number; it is the only candidate"),
    "argument_structure": Phenomenon("recall", "whether this verb takes an object, a passive, a causative"),
    "s-selection": Phenomenon("recall", "whether this noun is alive, and whether this verb asks for that"),
    "control_raising": Phenomenon("recall", "whether this verb or adjective is one of those that raise a subject"),
    "subject_verb_agreement": Phenomenon("structure", "which noun is the subject, across clauses and other nouns"),
    "binding": Phenomenon("structure", "which noun a reflexive may refer to: clause borders and c-command"),
    "npi_licensing": Phenomenon("structure", "whether a licensor stands over 'ever' and its like, not only near them"),
    "quantifiers": Phenomenon("structure", "whether a quantifier may stand in this construction or under negation"),
    "filler_gap_dependency": Phenomenon("structure", "whether a question word has a gap further on, across clauses"),
    "island_effects": Phenomenon("structure", "whether the gap lies in a phrase that nothing may be moved out of"),
    "ellipsis": Phenomenon("structure", "whether what is left out has its like in the first half of the sentence"),
}


def grouping() -> dict[str, dict[str, str]]:
    """Each phenomenon's group and why it is in it, as a study's facts hold it: the grouping is ours."""
    return {name: asdict(phenomenon) for name, phenomenon in PHENOMENA.items()}


@dataclass(frozen=True)
class Pairs:
    """Minimal pairs as tokens, each sentence begun by the separator: by paradigm (good, bad) sentences; and by
    paradigm its phenomenon."""

    sentences: dict[str, list[tuple[Tokens, Tokens]]]
    phenomena: dict[str, str]

    def __len__(self) -> int:
        return sum(map(len, self.sentences.values()))


def read_pairs(studied: Studied, path: Path, pairs_per_paradigm: int) -> Pairs:
    """The first pairs of each paradigm; their order in the file is random already.

    Raises StudyError for a file that is not BLiMP's, or a phenomenon that PHENOMENA does not name.
    """
    if pairs_per_paradigm < 1:
        raise StudyError(f"--pairs {pairs_per_paradigm}: at least 1 of each paradigm")
    texts: dict[str, list[tuple[str, str]]] = {}
    phenomena: dict[str, str] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            # Archives made on a Mac carry a second, binary file for each.
            names = sorted(n for n in archive.namelist() if n.endswith(".jsonl") and not n.startswith("__MACOSX"))
            for name in names:
                lines = archive.read(name).decode().splitlines()[:pairs_per_paradigm]
                records = [json.loads(line) for line in lines]
                paradigm = records[0]["UID"]
                phenomena[paradigm] = records[0]["linguistics_term"]
                texts[paradigm] = [(record["sentence_good"], record["sentence_bad"]) for record in records]
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise StudyError(f"{path} is not BLiMP's zip of .jsonl files: {error!r}") from error
    if not texts:
        raise StudyError(f"{path} holds no .jsonl file; give BLiMP's own zip")
    if unknown := sorted(set(phenomena.values()) - PHENOMENA.keys()):
        raise StudyError(f"{path}: phenomenon {unknown[0]!r} is in no group; known: {', '.join(PHENOMENA)}")
    return Pairs({name: _encode(studied, pairs) for name, pairs in texts.items()}, phenomena)


def _encode(studied: Studied, pairs: list[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
    flat = [sentence for pair in pairs for sentence in pair]
    encoded = studied.tokenizer.encode_batch(flat, add_special_tokens=False)
    tokens = [np.array([studied.separator, *sentence.ids], np.int32) for sentence in encoded]
    return list(zip(tokens[::2], tokens[1::2], strict=True))


@torch.inference_mode()
def log_probabilities(forward: Forward, sentences: Sequence[Tokens], firsts: Sequence[int]) -> list[float]:
    """Of each sentence, the sum over its tokens from index `first` (1 or more) on, in nats."""
    scores = [0.0] * len(sentences)
    for places, tokens in rectangles(sentences, batch_values(forward.model.config)):
        begin = torch.tensor([firsts[place] for place in places])
        scored = torch.arange(1, tokens.shape[1]) >= begin[:, None]
        # The head alone is half of a small model's work, so it runs where it is asked.
        logits = forward.model.logits(forward.hidden(tokens[:, :-1])[scored])
        gains = -F.cross_entropy(logits, tokens[:, 1:][scored], reduction="none").double()
        sums = torch.zeros(len(places), dtype=torch.float64).index_add(0, scored.nonzero()[:, 0], gains)
        for place, score in zip(places, sums.tolist(), strict=True):
            scores[place] = score
    return scores


def _first_difference(one: Tokens, other: Tokens) -> int:
    both = min(len(one), len(other))
    differ = np.flatnonzero(one[:both] != other[:both])
    return int(differ[0]) if len(differ) else both


def accuracies(studied: Studied, pairs: Pairs, rows: Rows | None = None, scale: Scale = 1.0) -> dict[str, float]:
    """By paradigm, the share of pairs whose good sentence scores higher; an exact tie is half a hit.

    What both sentences begin with has the same log-probability in both, so it is left out of both sums.
    """
    flat = [pair for group in pairs.sentences.values() for pair in group]
    firsts = [_first_difference(*pair) for pair in flat for _ in pair]
    scores = log_probabilities(Forward(studied, rows, scale), [tokens for pair in flat for tokens in pair], firsts)
    margins = iter([good - bad for good, bad in zip(scores[::2], scores[1::2], strict=True)])
    found = {}
    for paradigm, group in pairs.sentences.items():
        found[paradigm] = fmean((margin > 0) + (margin == 0) / 2 for margin in islice(margins, len(group)))
    return found


def by_phenomenon(pairs: Pairs, accuracy: Mapping[str, float]) -> dict[str, float]:
    """Mean over a phenomenon's paradigms."""
    named: dict[str, list[float]] = {phenomenon: [] for phenomenon in PHENOMENA}
    for paradigm, share in accuracy.items():
        named[pairs.phenomena[paradigm]].append(share)
    return {phenomenon: fmean(shares) for phenomenon, shares in named.items() if shares}


def by_group(pairs: Pairs, accuracy: Mapping[str, float]) -> dict[str, float]:
    """Mean over the paradigms of each group that there are, and over all."""
    grouped: dict[str, list[float]] = {"recall": [], "structure": []}
    for paradigm, share in accuracy.items():
        grouped[PHENOMENA[pairs.phenomena[paradigm]].group].append(share)
    means = {group: fmean(shares) for group, shares in grouped.items() if shares}
    return means | {"all": fmean(accuracy.values())}
