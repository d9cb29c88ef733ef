"""Engines over the shared tiny model; every table is built once, into one cache folder."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from engine.driver import OpenEngine, open_engine
from tolserve.engine.engine import Engine


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def engine_of(tiny_model_dir: Path, cache_dir: Path) -> OpenEngine:
    """`with engine_of(device_cache="16") as engine`: options as in EngineSettings, `model_dir` for another model."""

    def open_one(model_dir: Path = tiny_model_dir, **options: Any) -> contextlib.AbstractContextManager[Engine]:
        return open_engine(model_dir, cache_dir, **options)

    return open_one
