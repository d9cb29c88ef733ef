"""What a model is: its shape, read from and written to ``config.json``.

Source: paper sections 3, 4.2 and Table 5; key names are LLaMA's where LLaMA has the concept.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

from tolserve.tol.files import replacing

FfnVariant = Literal["base", "memory", "flex"]

MODEL_TYPE = "memoryllm"
ARCHITECTURE = "MemoryLLMForCausalLM"

# Keys of a Hugging Face LLaMA config that would change the forward pass, and the only value each may have here.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "attention_dropout": (0, 0.0),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


class ConfigError(ValueError):
    """A model configuration that cannot be run; the message names the key and says what it may be."""


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _rope_theta(raw: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` out of `rope_parameters`, where newer Hugging Face configs keep it."""
    parameters = raw.get("rope_parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict) or parameters.keys() - {"rope_theta", "rope_type"}:
        raise ConfigError(f"rope_parameters is {parameters!r}; only rope_theta and rope_type are supported")
    if parameters.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_type is {parameters['rope_type']!r}; only 'default' is supported")
    return {"rope_theta": parameters["rope_theta"]} if "rope_theta" in parameters else {}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one transformer.

    `hidden_size` is the paper's d, `intermediate_size` its K, `num_hidden_layers` its N and `vocab_size` its V.
    In `flex`, `intermediate_size` is FFN-M's and FFN-C is `flex_beta` square maps (paper section 4.2).

    Raises ConfigError for a value of the wrong type, or a shape that no forward pass can have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    ffn_variant: FfnVariant = "memory"
    flex_beta: int = 0
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        self._check_heads()
        self._check_variant()

    def _check_types(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a positive integer")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (_is_int(value) or isinstance(value, float)) or not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value!r}; it must be a positive number")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"tie_word_embeddings is {self.tie_word_embeddings!r}; it must be true or false")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or not 0 <= value < self.vocab_size):
                raise ConfigError(f"{name} is {value!r}; it must be one token id below {self.vocab_size}, or null")

    def _check_heads(self) -> None:
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} does not split into {self.num_attention_heads} heads of even width"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    def _check_variant(self) -> None:
        if self.ffn_variant not in get_args(FfnVariant):
            raise ConfigError(f"ffn_variant is {self.ffn_variant!r}; it must be one of {get_args(FfnVariant)}")
        if not _is_int(self.flex_beta) or (self.ffn_variant == "flex" and self.flex_beta not in (1, 2, 3)):
            raise ConfigError(f"flex_beta is {self.flex_beta!r}; a flex model has flex_beta 1, 2 or 3")
        if self.ffn_variant != "flex" and self.flex_beta:
            raise ConfigError(f"flex_beta is {self.flex_beta}, but ffn_variant is {self.ffn_variant!r}, not 'flex'")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def has_memory(self) -> bool:
        """Whether layers read rows of a table (memory and flex) or compute their whole FFN (base)."""
        return self.ffn_variant != "base"

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Read the keys of a ``config.json``. A plain LLaMA config is a base model.

        Raises ConfigError for another model type, a missing key, or an option that would change the arithmetic.
        """
        model_type = raw.get("model_type")
        if model_type not in (MODEL_TYPE, "llama"):
            raise ConfigError(f"model_type is {model_type!r}; tolserve runs {MODEL_TYPE!r} and 'llama' (as base)")
        for key, allowed in _FIXED.items():
            if key in raw and raw[key] not in allowed:
                raise ConfigError(f"{key} is {raw[key]!r}; only {allowed[0]!r} is supported")
        if raw.get("auto_map"):
            raise ConfigError("auto_map asks for code from the model directory; tolserve never runs any")
        known = _rope_theta(raw)
        known |= {name: raw[name] for name in cls.__dataclass_fields__ if raw.get(name) is not None}
        known.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        if model_type == "llama":
            if known.setdefault("ffn_variant", "base") != "base":
                raise ConfigError(f"ffn_variant is {known['ffn_variant']!r}; a 'llama' model is base")
            known.setdefault("tie_word_embeddings", False)
        elif "ffn_variant" not in known:
            raise ConfigError("ffn_variant is missing; a memoryllm config says 'base', 'memory' or 'flex'")
        try:
            config = cls(**known)
        except TypeError as error:
            raise ConfigError(f"config.json is incomplete: {error}") from error
        if raw.get("head_dim") not in (None, config.head_dim):
            raise ConfigError(f"head_dim is {raw['head_dim']!r}; only hidden_size / num_attention_heads is supported")
        return config

    @classmethod
    def load(cls, model_dir: Path) -> "ModelConfig":
        """Read `model_dir`/config.json. Raises ConfigError when it is missing, not JSON, or not ours."""
        path = model_dir / "config.json"
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{model_dir} holds no config.json; it is not a model directory") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds no JSON object")
        return cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_type": MODEL_TYPE,
            "architectures": [ARCHITECTURE],
            **asdict(self),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": None,
        }

    def save(self, model_dir: Path) -> None:
        with replacing(model_dir / "config.json") as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())
