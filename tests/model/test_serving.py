"""The serving model against the training form in float64, for every variant and every way to hold weights."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tiny import random_model, tiny_config
from tolkernels import Encoding, embedding_rows, fast_on_cpu, make_weight
from tolserve.model.blocks import rotary_tables
from tolserve.model.checkpoint import (
    WEIGHTS,
    CheckpointError,
    is_memory_tensor,
    load_transformer,
    save_checkpoint,
    save_tensors,
)
from tolserve.model.config import ConfigError, ModelConfig
from tolserve.model.serving import AddRow, Attend, Precision, ServingModel, no_rows, weight_sizes
from tolserve.model.transformer import Transformer, causal_attention

QUERY, ROW = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.memory.up_proj.weight"
# Sums in float32 over up to 192 products in up to three layers, against float64, as a share of the largest logit. The
# kernels of integer weights round a token's activations to 16 bits, about 2^-15 of the largest one at each map.
TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-4, "int8": 2e-3, "int4": 2e-3}


def dense_attention(config: ModelConfig, length: int) -> Attend:
    """One whole sequence attending over itself, in the way of the training form."""
    attend = causal_attention(*rotary_tables(config, length, torch.device("cpu")))
    heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    return lambda layer, qkv: attend(layer, *qkv.view(length, -1, config.head_dim).split(heads, dim=1)).flatten(1)


def rows_of(model: Transformer) -> Tensor:
    """[layers, V, d], rows computed by the networks."""
    return torch.stack([layer.memory_row(model.model.embed_tokens.weight) for layer in model.model.layers])


def add_from(rows: Tensor, tokens: Tensor, eps: float) -> AddRow:
    def add_row(layer: int, stream: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        stream = stream + rows[layer, tokens].to(stream.dtype)
        return stream, torch.nn.functional.rms_norm(stream, norm.shape, norm, eps)

    return add_row


def logits_of(model: ServingModel, tokens: Tensor, rows: Tensor | None) -> Tensor:
    add_row = no_rows if rows is None else add_from(rows, tokens, model.config.rms_norm_eps)
    return model.logits(model.hidden(tokens, dense_attention(model.config, len(tokens)), add_row))


def save(folder: Path, config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> Path:
    weights = {name: p.to(dtype) for name, p in random_model(config, seed).named_parameters()}
    save_checkpoint(folder, config, weights, None)
    return folder


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    variant = draw(st.sampled_from(["base", "memory", "flex"]))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (3, 1)]))
    return tiny_config(
        variant,
        vocab_size=draw(st.integers(2, 70)),
        hidden_size=heads * 32,
        intermediate_size=32 * draw(st.integers(1, 6)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        flex_beta=draw(st.integers(1, 3)) if variant == "flex" else 0,
        rms_norm_eps=draw(st.sampled_from([1e-5, 0.1])),
        rope_theta=draw(st.sampled_from([500.0, 10_000.0])),
        tie_word_embeddings=draw(st.booleans()),
    )


def as_held(matrix: Tensor, encoding: Encoding) -> Tensor:
    """A matrix [N, K] float64 with its numbers as the kernels hold them."""
    weight = make_weight(matrix.float(), encoding)
    return embedding_rows(torch.arange(len(matrix)), weight, torch.float32).double()


@pytest.mark.parametrize("held", ["float32", "bfloat16", "int8", "int4"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), tokens=st.lists(st.integers(0, 69), min_size=1, max_size=20), seed=st.integers(0, 1 << 16))
def test_logits_are_the_training_forms(
    tmp_path: Path, held: Encoding, config: ModelConfig, tokens: list[int], seed: int
) -> None:
    """Of the same weights as they are held; rows come from the checkpoint's own networks."""
    folder, ids = save(tmp_path, config, torch.float32, seed), torch.tensor(tokens) % config.vocab_size
    reference = load_transformer(folder, with_memory=True, dtype=torch.float64)
    rows = rows_of(reference) if config.has_memory else None
    for name, parameter in reference.named_parameters():
        looked_up = name == "model.embed_tokens.weight" and not config.tie_word_embeddings
        if parameter.ndim == 2 and "memory" not in name and not (looked_up and held in ("int8", "int4")):
            parameter.copy_(as_held(parameter, held))
    attend = causal_attention(*rotary_tables(config, len(ids), ids.device))
    expected = reference.logits(
        reference.hidden(ids[None], attend, lambda layer, x: x if rows is None else x + rows[layer, ids])
    )[0]
    options: dict[str, Any] = {"weights": held} if held.startswith("int") else {"dtype": getattr(torch, held)}
    model = ServingModel.load(folder, **{"dtype": torch.float32} | options)
    found = logits_of(model, ids, rows)
    assert found.dtype == torch.float32
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[held] * scale, rtol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_loses_nothing_of_a_checkpoint(tmp_path: Path, stored: torch.dtype) -> None:
    """Bit for bit the model of the widened weights, but for the order of sums."""
    config = tiny_config("flex")
    folder, ids = save(tmp_path / "a", config, stored), torch.tensor([5, 7, 5, 290])
    exact = load_transformer(folder, with_memory=True, dtype=torch.float64)
    found = logits_of(ServingModel.load(folder, dtype=torch.float32), ids, rows_of(exact))
    torch.testing.assert_close(found.double(), exact(ids[None])[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_weights_are_held_in(stored: torch.dtype, dtype: torch.dtype) -> None:
    name, asked = (str(each).removeprefix("torch.") for each in (stored, dtype))
    cpu = Precision(dtype)
    assert cpu.activations == torch.float32
    wanted = asked if stored == torch.float32 else name
    assert cpu.matrix(stored) == (wanted if fast_on_cpu(wanted) else "float32")  # type: ignore[arg-type]
    assert cpu.embedding(stored) == (asked if stored == torch.float32 else name)
    cuda = Precision(dtype, device="cuda")
    assert (cuda.activations, cuda.matrix(stored)) == (dtype, asked)
    for weights in ("int8", "int4"):
        for device in ("cpu", "cuda"):
            quantised = Precision(dtype, weights, device)  # type: ignore[arg-type]
            assert quantised.matrix(stored) == weights
            assert quantised.embedding(stored) == cpu.embedding(stored)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_rounded_are_told_once(
    stored: torch.dtype, dtype: torch.dtype, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config("base", tie_word_embeddings=tied)
    model = ServingModel.random(config, dtype=dtype, stored=stored)
    held = {getattr(torch, weight.encoding) for weight in model.weights()}
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(stored)
    lost = not all(torch.equal(numbers.to(each).double(), numbers.double()) for each in held)
    assert [f"--dtype {str(stored).removeprefix('torch.')} keeps" in each for each in caplog.messages] == [True] * lost
    caplog.clear()
    ServingModel.random(config, dtype=dtype, stored=dtype, weights="int8")
    assert caplog.messages == [], "who asks for integers knows that they are rounded"


WITHOUT_KERNELS = """
import logging, torch
from tiny import tiny_config
from tolserve.model.serving import Precision, ServingModel
logging.basicConfig()
for stored in (torch.float32, torch.bfloat16, torch.float16):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert Precision(dtype).matrix(stored) == "float32"
for weights in ("auto", "int8", "int4"):
    ServingModel.random(tiny_config(), dtype=torch.bfloat16, weights=weights)
"""


def test_without_kernels_nothing_slow_is_chosen_and_what_is_asked_for_is_told(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    shutil.copytree(root / "kernels" / "tolkernels", tmp_path / "tolkernels", ignore=shutil.ignore_patterns("*.so"))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{root / 'server'}:{root / 'tests'}"}
    command = [sys.executable, "-c", WITHOUT_KERNELS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [word for word in ("auto", "int8", "int4") if f"--weights {word} takes" in done.stderr] == ["int8", "int4"]


def test_a_tied_embedding_is_held_once(tmp_path: Path) -> None:
    tied = ServingModel.load(save(tmp_path / "a", tiny_config(), torch.bfloat16), dtype=torch.float32, weights="int8")
    assert tied.embedding is tied.head
    config = tiny_config(tie_word_embeddings=False)
    untied = ServingModel.load(save(tmp_path / "b", config, torch.bfloat16), dtype=torch.float32, weights="int8")
    assert (untied.embedding.encoding, untied.head.encoding) == ("bfloat16", "int8")


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("variant", ["base", "memory", "flex"])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_known_before(weights: Any, variant: Any, tied: bool) -> None:
    shape = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": tied}
    config = tiny_config(variant, **shape)
    for stored in (torch.float32, torch.bfloat16):
        precision = Precision(torch.float32, weights)
        said = weight_sizes(config, precision, lambda _, stored=stored: stored)
        model = ServingModel.random(config, dtype=torch.float32, weights=weights, stored=stored)
        assert said.layers + said.embedding == pytest.approx(model.nbytes, rel=0.01)
        ends = {id(weight): weight.nbytes for weight in (model.embedding, model.head)}
        assert said.embedding == pytest.approx(sum(ends.values()), rel=0.01)
        assert said.encodings == {each.encoding for each in model.weights()}


def test_int4_needs_whole_groups(tmp_path: Path) -> None:
    config = tiny_config("base", intermediate_size=80)
    for act in (
        lambda: ServingModel.load(save(tmp_path, config, torch.bfloat16), dtype=torch.float32, weights="int4"),
        lambda: weight_sizes(config, Precision(torch.float32, "int4"), lambda _: torch.float32),
    ):
        with pytest.raises(ConfigError, match="intermediate_size 80 with --weights int4: it must be a multiple of 32"):
            act()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save(tmp_path / "model", tiny_config(), torch.bfloat16)


def rewrite(model_dir: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(model_dir / WEIGHTS)
    change(tensors)
    save_tensors(model_dir / WEIGHTS, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(QUERY), QUERY),
        (lambda tensors: tensors.update({"lm_head.weight": torch.zeros(2)}), "lm_head"),
        (lambda tensors: tensors.update({QUERY: torch.zeros(32, 31)}), rf"{QUERY}.*\[32, 31\].*\[32, 32\]"),
        (lambda tensors: tensors.update({QUERY: torch.zeros(32, 32, dtype=torch.int8)}), QUERY),
        (lambda tensors: tensors[QUERY].fill_(float("nan")), "q_proj.*not finite"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "model.norm"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    model_dir: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    rewrite(model_dir, change)
    with pytest.raises(CheckpointError, match=message):
        ServingModel.load(model_dir, dtype=torch.float32, weights="int8")


def test_memory_tensors_may_be_there_and_are_never_read(model_dir: Path) -> None:
    ids = torch.tensor([3, 1, 4, 1])
    rows = rows_of(load_transformer(model_dir, with_memory=True, dtype=torch.float32))
    whole = logits_of(ServingModel.load(model_dir, dtype=torch.float32), ids, rows)
    rewrite(model_dir, lambda tensors: tensors.update({ROW: torch.zeros(3, dtype=torch.int32)}))  # unreadable if read
    assert torch.equal(logits_of(ServingModel.load(model_dir, dtype=torch.float32), ids, rows), whole)
    rewrite(model_dir, lambda tensors: [tensors.pop(name) for name in list(tensors) if is_memory_tensor(name)])
    assert torch.equal(logits_of(ServingModel.load(model_dir, dtype=torch.float32), ids, rows), whole)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_a_running_model_does_not_change_with_the_file(tmp_path: Path, stored: torch.dtype, weights: Any) -> None:
    model_dir = save(tmp_path, tiny_config("flex", tie_word_embeddings=False), stored)
    ids, rows = torch.tensor([3, 1, 4, 1]), torch.zeros(2, 300, 32)
    model = ServingModel.load(model_dir, dtype=torch.float32, weights=weights)
    before = logits_of(model, ids, rows)
    with (model_dir / WEIGHTS).open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\xff" * size)
    assert torch.equal(logits_of(model, ids, rows), before)


PEAK = """
import re, sys, torch
from pathlib import Path
from tolserve.model.serving import ServingModel

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
ServingModel.load(Path(sys.argv[1]), dtype=torch.float32, weights=sys.argv[3])
before = status("VmRSS")
model = ServingModel.load(Path(sys.argv[2]), dtype=torch.float32, weights=sys.argv[3])
print(status("VmHWM") - before, status("VmRSS") - before, model.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_loading_takes_little_beside_the_model(tmp_path: Path, weights: str) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16}
    small = save(tmp_path / "small", tiny_config("base"), torch.bfloat16)
    large = save(tmp_path / "large", tiny_config("base", **shape), torch.bfloat16)
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(small), str(large), weights], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    peak, kept, held = map(int, re.findall(r"\d+", ran.stdout))
    assert kept > 0.9 * held, "the measurement does not see the model"
    assert kept < 1.3 * held, "the file stays mapped, or what was freed was not given back"
    assert peak < 2 * held  # int8 is rounded from float32, a layer at a time


def test_random_models_are_of_the_shape() -> None:
    config = tiny_config("base", vocab_size=70, tie_word_embeddings=False)
    model = ServingModel.random(config, dtype=torch.float32)
    found = logits_of(model, torch.tensor([1, 2, 3]), None)
    assert found.shape == (3, 70)
    assert found.std() > 0
