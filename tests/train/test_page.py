"""docs/training.md: its commands and programs work on a tiny case, and its names are those that are written."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tiny import tiny_config
from tiny_run import sentences
from tolserve.cli import main
from tolserve.model.config import ModelConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [shlex.split(line) for kind, text in BLOCKS if not kind for line in text.splitlines()]
PROGRAMS = [text for kind, text in BLOCKS if kind == "python"]
# Behind what the page says, so that it takes a second. The shape of a checkpoint that is given is its own.
SHORT = shlex.split("--steps 2 --warmup 1 --length 16 --batch 16 --threads 1 --device cpu")
SMALL = shlex.split("--vocab-size 300 --hidden-size 32 --num-hidden-layers 2")
SMALL += shlex.split("--num-attention-heads 4 --num-key-value-heads 2")


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, model_dir_of: Callable[[ModelConfig], Path]
) -> Path:
    """The files that the page's commands name; what they write comes here too."""
    here = tmp_path_factory.mktemp("page")
    for seed, name in enumerate(("books", "other")):
        lines = (json.dumps({"text": sentences(10 * seed + each)}) + "\n" for each in range(3))
        (here / f"{name}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    tokenizer.save(str(here / "tokenizer.json"))
    (here / "path" / "to").mkdir(parents=True)
    llama = model_dir_of(tiny_config("base")).rename(here / "path" / "to" / "llama")
    raw = json.loads((llama / "config.json").read_text())
    raw = {key: raw[key] for key in raw if key not in ("ffn_variant", "flex_beta", "architectures")}
    (llama / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    return here


def run(argv: list[str]) -> None:
    if argv[0] == "torchrun":
        paths = os.pathsep.join([str(ROOT / "server"), str(ROOT / "kernels")])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *argv[1:]], env=environment, check=True)
    else:
        assert argv[0] == "tolserve"
        assert main(argv[1:]) == 0


def terms(heading: str) -> set[str]:
    """What the first column of the table under `heading` names."""
    rows = PAGE.split(f"\n{heading}\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    return {name for row in rows for name in re.findall("`([^`]+)`", row.split("|")[1])}


def test_the_commands_and_programs_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(PROGRAMS[0], {})
    assert np.load("tokens.npy").dtype == np.uint16
    np.save("tokens.npy", np.tile(np.load("tokens.npy"), 60))
    assert len(COMMANDS) == 8
    for argv in COMMANDS:
        if argv[:2] == ["tolserve", "serve"]:
            continue  # takes no more than any other start of a server
        if "train" in argv:
            argv = [*argv, *SHORT, *([] if "--init-from" in argv else SMALL)]
        run(argv)
    written = {path.name + "/" * path.is_dir() for path in Path("runs/mine").iterdir()}
    assert terms("| file in `--out` | |") == written - {"tol/"}
    assert (Path("runs/mine/loss.csv").read_text().splitlines()[0]).split(",") == re.findall(
        "`([^`]+)`", PAGE.split("every ten steps: ")[1].split("|")[0]
    )
    assert terms("| figure | |") == json.loads(Path("runs/mine/figures.json").read_text()).keys()
    for name in ("flex", "1B", "two", "from-llama", "distilled"):
        assert Path(f"runs/{name}/model.safetensors").is_file()


def test_it_opens_in_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(folder)
    if not Path("runs/mine/model.safetensors").exists():
        run([*COMMANDS[0], *SHORT, *SMALL])
    exec(PROGRAMS[1], {})
    assert capsys.readouterr().out.startswith("The old")
    given, copy = (load_file(f"runs/{name}/model.safetensors") for name in ("mine", "copy"))
    assert {name: tensor.shape for name, tensor in given.items()} == {name: t.shape for name, t in copy.items()}
