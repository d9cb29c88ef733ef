"""Losses of models with other rows and scaled ones, against the slow reference."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from slow_study import Scaled
from tiny import TEXT
from tolserve.model.config import FfnVariant
from tolserve.study.evaluate import Forward, Studied, load, loss_of, network_rows, perplexity_of, read_text
from tolserve.study.report import StudyError
from tolserve.train.data import DataError

VARIANTS: list[FfnVariant] = ["base", "memory", "flex"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1.0, 0.5, [0.3, 1.7], [0.0, 1.0]])
def test_a_scale_multiplies_what_the_networks_put_out(
    studied_of: Callable[[FfnVariant], Studied], text: Path, variant: FfnVariant, scale: float | list[float]
) -> None:
    studied = studied_of(variant)
    reference = Scaled(studied, None, scale if isinstance(scale, list) else [scale] * 2)
    ids = [studied.separator, *studied.tokenizer.encode(TEXT).ids]
    nats = [
        -value for start in range(0, len(ids) - 1, 16) for value in reference.log_probabilities(ids[start : start + 17])
    ]
    loss = loss_of(studied, read_text(studied, text, None, 16), 16, scale=scale)
    assert loss.tokens == len(ids) - 1 == len(nats)
    assert loss.nats_per_token == pytest.approx(np.mean(nats), rel=1e-4)
    assert perplexity_of(loss) == pytest.approx(np.exp(np.mean(nats)), rel=1e-3)
    assert loss.bits_per_byte == pytest.approx(sum(nats) / np.log(2) / len(TEXT.encode()), rel=1e-4)


@pytest.mark.parametrize("variant", ["memory", "flex"])
def test_given_rows_take_the_networks_place(studied_of: Callable[[FfnVariant], Studied], variant: FfnVariant) -> None:
    studied = studied_of(variant)
    tokens = torch.tensor([[0, 5, 5, 9, 299 % studied.config.vocab_size]])
    own = network_rows(studied)
    torch.testing.assert_close(Forward(studied, own)(tokens), studied.model(tokens))
    other = torch.randn_like(own)
    expected = Scaled(studied, other.double().numpy(), [0.5, 2.0]).logits(tokens[0].tolist())
    found = Forward(studied, other, [0.5, 2.0])(tokens)[0].double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_base_model_is_left_as_it_was(studied_of: Callable[[FfnVariant], Studied]) -> None:
    studied, tokens = studied_of("base"), torch.tensor([[0, 1, 2]])
    before = studied.model(tokens)
    assert not torch.equal(Forward(studied, None, 0.0)(tokens), before)
    assert torch.equal(studied.model(tokens), before)


def test_a_part_of_a_text_is_the_middle_of_each_document(
    studied_of: Callable[[FfnVariant], Studied], tmp_path: Path
) -> None:
    studied = studied_of("memory")
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "' + "a" * 30 + "the " * 5 + "b" * 30 + '"}\n{"text": "of"}\n')
    whole = read_text(studied, path, None, 4)
    part = read_text(studied, path, 5, 4)
    assert len(part.documents) == 2
    assert part.documents[0].tolist() in [
        [studied.separator, *whole.documents[0][start : start + 4].tolist()]
        for start in [len(whole.documents[0]) // 2 - 2 + shift for shift in (0, 1)]
    ]
    assert part.documents[1].tolist() == whole.documents[1].tolist()
    decoded = [studied.tokenizer.decode(document[1:].tolist()) for document in part.documents]
    assert part.text_bytes == sum(len(document.encode()) for document in decoded)


def test_a_part_of_many_documents_has_their_context(
    studied_of: Callable[[FfnVariant], Studied], tmp_path: Path
) -> None:
    """As many documents as it takes, spread over the file, each whole or at least a window of it."""
    studied, path = studied_of("memory"), tmp_path / "text.jsonl"

    def taken(words: list[int], tokens: int, length: int) -> list[int]:
        """Sizes of what is taken of documents of so many tokens each: a letter is one here."""
        letters = (f"{chr(65 + index % 26)}" * size for index, size in enumerate(words))
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in letters))
        sizes = [len(document) - 1 for document in read_text(studied, path, None, length).documents]
        assert sizes == words
        return [len(document) - 1 for document in read_text(studied, path, tokens, length).documents]

    assert taken([60] * 50, 300, 32) == [34] * 9
    assert taken([60] * 50, 20, 32) == [20]
    assert taken([10] * 50, 300, 32) == [10] * 30
    assert taken([200] * 2, 300, 32) == [150] * 2
    assert taken([3] * 9 + [300], 100, 32) == [3] * 9 + [73]
    assert taken([10] * 3, 300, 32) == [10] * 3
    spread = [60 if index % 10 == 5 else 1 for index in range(50)]
    assert taken(spread, 10_000, 32) == spread
    assert taken([0, 0], 10, 32) == [0, 0]


def test_what_cannot_be_studied_says_why(
    studied_of: Callable[[FfnVariant], Studied], tmp_path: Path, tiny_model_dir: Path
) -> None:
    base, memory = studied_of("base"), studied_of("memory")
    shape = (memory.config.vocab_size, 2, 32)
    with pytest.raises(StudyError, match="base model"):
        Forward(base, torch.zeros(shape))
    with pytest.raises(StudyError, match="base model"):
        network_rows(base)
    with pytest.raises(StudyError, match="shape"):
        Forward(memory, torch.zeros(3, 2, 32))
    with pytest.raises(StudyError, match="3 scales"):
        Forward(memory, scale=[1, 2, 3])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="empty"):
        loss_of(memory, read_text(memory, tmp_path / "empty.txt", None, 16), 16)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    with pytest.raises(StudyError, match=r"tokenizer\.json"):
        load(tmp_path)
