"""Fixtures that several test folders share: tiny models, their checkpoints, and quiet determinism."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer

from tiny import TEXT, random_model, tiny_config
from tolserve.model.checkpoint import compute_fingerprint, save_checkpoint
from tolserve.model.config import ModelConfig
from tolserve.train.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer

# Shared machines stall for seconds, and a deadline would then fail a correct test.
settings.register_profile("tolserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tolserve")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-tools",
        action="store_true",
        help="fail, instead of skipping, where a test needs a program that is not installed",
    )


@pytest.fixture(scope="session")
def tool(pytestconfig: pytest.Config) -> Callable[[str], str]:
    """`tool("promtool")`: the program's path. Where it is missing, the test is skipped, or fails (--require-tools)."""

    def find(name: str) -> str:
        if path := shutil.which(name):
            return path
        reason = f"this test runs the program {name}, which is not installed or not on PATH"
        if pytestconfig.getoption("--require-tools"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)

    return find


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE of at most 300 tokens; id 0 is the end of text."""
    return train_tokenizer([TEXT], 300)


@pytest.fixture(scope="session")
def model_dir_of(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Callable[[ModelConfig], Path]:
    """`model_dir_of(config)`: a whole model directory with random bfloat16 weights and the tiny tokenizer."""

    def write(config: ModelConfig) -> Path:
        folder = tmp_path_factory.mktemp("model")
        end = tokenizer.token_to_id(END_OF_TEXT)
        named = ModelConfig(**vars(config) | {"bos_token_id": end, "eos_token_id": end})
        weights = {name: p.to(torch.bfloat16) for name, p in random_model(named).named_parameters()}
        fingerprint = compute_fingerprint(named, weights) if named.has_memory else None
        save_checkpoint(folder, named, weights, fingerprint)
        save_tokenizer(tokenizer, folder, named.max_position_embeddings, end)
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_model_dir(model_dir_of: Callable[[ModelConfig], Path]) -> Path:
    """A memory model on disk, read by many tests: copy it before changing it."""
    return model_dir_of(tiny_config())
