"""A byte-level BPE tokenizer trained on the corpus, saved the way Hugging Face tokenizers are."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tolserve.tol.files import replacing
from tolserve.train.recipe import TrainError

END_OF_TEXT = "<|endoftext|>"

# The demo model is no chat model: a conversation is laid out as paragraphs of prose, which is what it has read.
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text encodes, and decodes to itself. Id 0 is the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """Raises TrainError for a file that is none."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more special
        raise TrainError(f"{path} cannot be used as a tokenizer: {error}") from error


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Whole or not at all, since a run goes on with it."""
    with replacing(path) as file:
        file.write(tokenizer.to_str(pretty=True).encode())


def end_of_text(tokenizer: Tokenizer, path: Path) -> int:
    """What ends a text: `eos_token` of the tokenizer_config.json beside the tokenizer's `path`, else END_OF_TEXT.

    Raises TrainError where the tokenizer does not have it.
    """
    beside, name = path.with_name("tokenizer_config.json"), END_OF_TEXT
    if beside.is_file():
        try:
            named = json.loads(beside.read_text()).get("eos_token") or END_OF_TEXT
            name = str(named["content"] if isinstance(named, dict) else named)
        except (ValueError, AttributeError, KeyError) as error:
            raise TrainError(f"{beside} cannot be read: {error!r}") from error
    end = tokenizer.token_to_id(name)
    if end is None:
        raise TrainError(
            f"the tokenizer {path} has no {name!r} token to separate documents by; name one that it has as eos_token "
            f"in {beside}"
        )
    return end


def save_tokenizer(tokenizer: Tokenizer, model_dir: Path, context: int, end: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json. `end` is the token that ends a text."""
    write_tokenizer(tokenizer, model_dir / "tokenizer.json")
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.id_to_token(end),
            "eos_token": tokenizer.id_to_token(end),
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
        "generation_config.json": {"bos_token_id": end, "eos_token_id": end},
    }
    for name, content in files.items():
        with replacing(model_dir / name) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())
