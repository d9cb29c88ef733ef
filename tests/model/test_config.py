"""config.json: what is read comes back, and what would change the arithmetic unseen is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny import tiny_config
from tolserve.model.config import ConfigError, ModelConfig
from tolserve.model.presets import SIZES, VARIANTS, preset

NUMBERS = ("rms_norm_eps", "rope_theta")
SIZES_OF_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads, groups, half_width = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 16))
    variant = draw(st.sampled_from(["base", "memory", "flex"]))
    vocabulary = draw(st.integers(1, 200_000))
    token = st.none() | st.integers(0, vocabulary - 1)
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=kv_heads * groups * half_width * 2,
        intermediate_size=draw(st.integers(1, 10_000)),
        num_hidden_layers=draw(st.integers(1, 100)),
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        ffn_variant=variant,
        flex_beta=draw(st.integers(1, 3)) if variant == "flex" else 0,
        rms_norm_eps=draw(st.floats(1e-12, 1e-2)),
        rope_theta=draw(st.floats(1.0, 1e7)),
        max_position_embeddings=draw(st.integers(1, 1 << 20)),
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=draw(token),
        eos_token_id=draw(token),
    )


def raw_config(**changes: object) -> dict[str, object]:
    return tiny_config("memory").to_dict() | changes


@given(configs())
def test_a_config_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    config = tiny_config("flex", tie_word_embeddings=False, rope_theta=5e5, eos_token_id=0)
    config.save(tmp_path)
    assert ModelConfig.load(tmp_path) == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "memoryllm"
    assert written["architectures"] == ["MemoryLLMForCausalLM"]


@given(st.sampled_from(SIZES_OF_SHAPE), st.sampled_from([0, -1, 1.0, 32.0, "32", True, [32], {}, float("nan")]))
def test_a_size_that_is_no_positive_integer_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_dict(raw_config(**{name: value}))


@given(st.sampled_from(NUMBERS), st.sampled_from([0, -1e-5, "1e-5", True, float("nan"), float("inf"), [1.0]]))
def test_a_number_that_is_not_positive_and_finite_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_dict(raw_config(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("sliding_window", 4096),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_theta": 1e4, "factor": 8.0}),
        ("rope_parameters", "default"),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}),
        ("attention_dropout", 0.1),
        ("auto_map", {"AutoModel": "code.Model"}),
        ("head_dim", 4),
        ("model_type", "mistral"),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", [1, 2]),
        ("eos_token_id", 300),
        ("bos_token_id", -1),
        ("ffn_variant", "dense"),
        ("ffn_variant", ["memory"]),
        ("flex_beta", 1),
    ],
)
def test_an_option_that_would_change_the_arithmetic_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="rope_type" if "yarn" in str(value) else name):
        ModelConfig.from_dict(raw_config(**{name: value}))


@pytest.mark.parametrize("beta", [0, 4, -1, True, 2.0, None])
def test_flex_needs_a_beta_of_one_to_three(beta: object) -> None:
    with pytest.raises(ConfigError, match="flex_beta"):
        ModelConfig.from_dict(raw_config(ffn_variant="flex", flex_beta=beta))


@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 30, "num_attention_heads": 4},  # no whole heads
        {"hidden_size": 12, "num_attention_heads": 4},  # heads of odd width cannot rotate
        {"num_attention_heads": 4, "num_key_value_heads": 3},
    ],
)
def test_a_shape_whose_heads_do_not_fit_is_refused(shape: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="heads"):
        ModelConfig.from_dict(raw_config(**shape))


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "ffn_variant"])
def test_a_missing_key_is_named(name: str) -> None:
    raw = raw_config()
    del raw[name]
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_dict(raw)


def test_a_llama_config_is_a_base_model_with_llamas_defaults() -> None:
    raw = raw_config(model_type="llama")
    for ours in ("ffn_variant", "flex_beta", "tie_word_embeddings", "num_key_value_heads"):
        del raw[ours]
    config = ModelConfig.from_dict(raw)
    assert config.ffn_variant == "base"
    assert not config.has_memory
    assert not config.tie_word_embeddings
    assert config.num_key_value_heads == config.num_attention_heads


def test_a_llama_config_with_a_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="ffn_variant"):
        ModelConfig.from_dict(raw_config(model_type="llama"))


def test_the_rotary_base_is_found_in_either_place() -> None:
    raw = raw_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    del raw["rope_theta"]
    assert ModelConfig.from_dict(raw).rope_theta == 5e5
    assert ModelConfig.from_dict(raw_config(rope_theta=7e5)).rope_theta == 7e5


@pytest.mark.parametrize("content", [None, "{", "[]", "null", "\x00\xff"])
def test_a_folder_without_a_readable_config_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_papers_shapes_are_valid(size: str, variant: str) -> None:
    config = preset(size, variant)
    assert config.num_hidden_layers == 24
    assert config.has_memory == (variant != "base")
    assert config.flex_beta == (int(variant[-1]) if variant.startswith("flex") else 0)
