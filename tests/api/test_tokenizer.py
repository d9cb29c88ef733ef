"""Tokens and bytes, and what a model directory must hold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors

from tolserve.api.tokenizer import Defaults, ModelFiles, ModelFilesError, ModelTokenizer
from tolserve.train.tokenizer import END_OF_TEXT, train_tokenizer

TEXT = "The old house — café 漢字 🙂"
RAW = train_tokenizer([TEXT], 280)
TOKENIZER = ModelTokenizer(RAW)
IDS = st.lists(st.integers(0, RAW.get_vocab_size() - 1), max_size=20)


@given(IDS)
def test_bytes_of_tokens_give_the_text_that_tokenizers_gives(ids: list[int]) -> None:
    assert TOKENIZER.decode(ids) == RAW.decode(ids, skip_special_tokens=False)


@given(st.text(max_size=20))
def test_any_text_survives(text: str) -> None:
    prompt = TOKENIZER.encode(text)
    assert TOKENIZER.decode(prompt.ids) == text
    assert prompt.added == frozenset()


def test_a_token_that_is_no_whole_text_is_labelled_by_its_bytes() -> None:
    lead = next(token for token in range(RAW.get_vocab_size()) if TOKENIZER.to_bytes(token) == b"\xf0")
    assert TOKENIZER.label(lead) == r"bytes:\xf0"
    assert TOKENIZER.label(RAW.token_to_id("A")) == "A"
    assert TOKENIZER.label(RAW.token_to_id(END_OF_TEXT)) == END_OF_TEXT


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    assert TOKENIZER.to_bytes(RAW.get_vocab_size()) == b""


def test_tokens_added_by_the_post_processor_are_known() -> None:
    raw = Tokenizer.from_str(RAW.to_str())
    raw.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, raw.token_to_id(END_OF_TEXT))]
    )
    tokenizer = ModelTokenizer(raw)
    with_special = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert with_special.added == {0}
    assert with_special.ids[0] == raw.token_to_id(END_OF_TEXT)
    assert tokenizer.encode("ab", add_special_tokens=False).added == frozenset()


def test_long_prompts_are_never_truncated() -> None:
    raw = Tokenizer.from_str(RAW.to_str())
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    assert ModelTokenizer(raw).encode("abc def ghi").ids == TOKENIZER.encode("abc def ghi").ids


def test_other_decoders_are_refused() -> None:
    raw = Tokenizer(models.BPE({"a": 0}, []))
    raw.decoder = decoders.ByteFallback()
    with pytest.raises(ModelFilesError, match="ByteLevel"):
        ModelTokenizer(raw)
    with pytest.raises(ModelFilesError, match="ByteLevel"):
        ModelTokenizer(Tokenizer(models.BPE({"a": 0}, [])))


def change(name: str, **values: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
        (change("config.json", vocab_size=None), "vocab_size"),
        (change("config.json", vocab_size=299), "vocab_size is 299"),
        (change("generation_config.json", temperature=3), "temperature"),
        (change("generation_config.json", top_k="many"), "top_k"),
        (change("tokenizer_config.json", chat_template="{% if %}"), "Jinja"),
        (shutil.rmtree, "no model directory"),
    ],
)
def test_a_wrong_model_directory_is_refused(
    model_dir: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        ModelFiles.load(folder)


def test_generation_config_sets_the_defaults(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    assert ModelFiles.load(folder).defaults == Defaults()
    change("generation_config.json", temperature=0.5, top_p=0.9, top_k=40, eos_token_id=[5, 6])(folder)
    files = ModelFiles.load(folder)
    assert files.defaults == Defaults(0.5, 0.9, 40)
    assert files.eos_token_ids == {0, 5, 6}
