"""What an engine is told at its start."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class EngineSettings:
    """The engine's part of the server's options, in their JSON form; `tolserve serve --help` explains each."""

    model: str
    cache_dir: str
    table: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    weights: Literal["auto", "int8", "int4"] = "auto"
    device_cache: str = "10%"
    host_cache: str = "0"
    tol_policy: str = "context"
    tol_frequencies: str | None = None
    tol_save_frequencies: str | None = None
    tol_trace: str | None = None
    tol_encoding: str = "bf16"
    any_encoding: bool = False  # take the table at --table or MODEL/tol whatever its encoding
    tol_io: str = "direct"
    tol_read_depth: int = 32
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    max_queue: int = 256
    kv_cache: str = "auto"
    prefix_cache: bool = True
    packs: str | None = None
    pack_memory: str = "256MiB"
    threads: int | None = None
    log_format: str = "auto"
    log_level: str = "info"

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "EngineSettings":
        """Raises TypeError for an unknown or missing key."""
        return cls(**raw)
