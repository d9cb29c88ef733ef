"""A model directory without weights, which is all the API reads, and a client for an app whose engine never starts."""

import json
from pathlib import Path

import pytest
from fastapi import FastAPI

from api.wire import CONTEXT, VOCAB_SIZE, Call, caller
from tolserve.api.app import create_app
from tolserve.api.tokenizer import ModelFiles
from tolserve.settings import ServeSettings
from tolserve.train.tokenizer import save_tokenizer, train_tokenizer

TEXT = "The old house stood at the end of the lane. “Who's there?” cried the boy. café naïve Ωμέγα 漢字 🙂\n" * 3


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    save_tokenizer(train_tokenizer([TEXT], 300), folder, CONTEXT, end=0)
    config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def files(model_dir: Path) -> ModelFiles:
    return ModelFiles.load(model_dir)


@pytest.fixture
def app(model_dir: Path) -> FastAPI:
    return create_app(ServeSettings(model=model_dir))


@pytest.fixture
def call(app: FastAPI) -> Call:
    return caller(app)
