"""llama.cpp as a peer, through llama-cpp-python: a LLaMA of random weights in F16, Q8_0 or Q4_K.

The gguf file is written on the first run and kept. Every matrix is in the format named, where llama.cpp's own mixes for
Q4_K keep some larger: that is its smallest and fastest. No token is sampled, which is in its favour.
Needs llama-cpp-python, gguf and numpy (`CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf numpy`).
"""

import ctypes
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as lib
import numpy as np
from numpy.typing import NDArray
from peer import serve

FTYPES = {"F16": 1, "Q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_K": lib.LLAMA_FTYPE_MOSTLY_Q4_K_S}

ERROR = 4  # ggml's log level
CELLS = 256  # it rounds a sequence's keys and values up to this


@lib.llama_log_callback
def _log(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Errors alone; the rest is hundreds of lines."""
    if level == ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


class LlamaCpp:
    def __init__(self, options: dict[str, Any]) -> None:
        """options: shape (a LLaMA's config.json), format, files (a folder), room, threads, gpu_layers."""
        lib.llama_log_set(_log, None)
        path = gguf_file(Path(options["files"]), options["format"], options["shape"])
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE  # in memory of its own, as the others
        params.n_gpu_layers = options["gpu_layers"]
        self._model = lib.llama_model_load_from_file(str(path).encode(), params)
        if self._model is None:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self._context: Any = None
        self._size = (0, 0)  # of the context: sequences and tokens
        self._threads, self._room = options["threads"], options["room"]
        self._positions: list[int] = []
        self._kv_bytes = 2 * 2 * options["shape"]["num_hidden_layers"] * options["shape"]["hidden_size"]

    def start(self, prompts: list[list[int]]) -> None:
        self._open(len(prompts), max(map(len, prompts)) + self._room)
        self._positions = [len(prompt) for prompt in prompts]
        for sequence, prompt in enumerate(prompts):
            self._decode([(token, at, sequence, at == len(prompt) - 1) for at, token in enumerate(prompt)])

    def _open(self, sequences: int, longest: int) -> None:
        """A context, which has the keys and values: the last one, emptied, if it is of that size."""
        size = (sequences, sequences * -(-longest // CELLS) * CELLS)
        if self._context is not None and size == self._size:
            lib.llama_memory_clear(lib.llama_get_memory(self._context), False)  # what lay in cells need not be wiped
            return
        if self._context is not None:
            lib.llama_free(self._context)
        self._size = size
        params = lib.llama_context_default_params()
        params.n_seq_max, params.n_ctx = size
        params.n_batch = 2048
        params.n_threads = params.n_threads_batch = self._threads
        self._context = lib.llama_init_from_model(self._model, params)
        if self._context is None:
            raise RuntimeError(f"llama.cpp has no room for {sequences} sequences of {longest} tokens")

    def step(self, tokens: list[int]) -> None:
        self._decode([(token, self._positions[i], i, True) for i, token in enumerate(tokens)])
        self._positions = [position + 1 for position in self._positions]

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Run (token, position, sequence, whether its logits are wanted) and wait for the logits."""
        batch = lib.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        status = lib.llama_decode(self._context, batch)
        lib.llama_synchronize(self._context)
        lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode: status {status}")

    def facts(self) -> dict[str, Any]:
        return {
            "version": version("llama-cpp-python"),
            "system": lib.llama_print_system_info().decode().strip(),
            "bytes": {"weights": lib.llama_model_size(self._model), "kv_per_token": self._kv_bytes},  # keys in F16
        }

    def use(self, **options: Any) -> None:
        raise RuntimeError(f"llama.cpp has nothing to change: {options}")


def gguf_file(folder: Path, kind: str, shape: dict[str, Any]) -> Path:
    """The file of a random LLaMA, written first where it is not there."""
    name = "-".join(str(shape[k]) for k in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"))
    path = folder / f"random-{name}-{kind}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        coming = path.with_suffix(".part")
        write_gguf(coming, kind, shape)
        coming.rename(path)
    return path


def write_gguf(path: Path, kind: str, shape: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_rope_dimension_count(shape["hidden_size"] // shape["num_attention_heads"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_file_type(FTYPES[kind])
    quantised = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[quantised]  # of a block
    tensors = dict(shapes(shape))
    stored = {name: (*rows, width // values * size) for name, (*rows, width) in tensors.items() if rows}
    for name, extent in tensors.items():
        if name in stored:
            writer.add_tensor_info(name, stored[name], np.dtype(np.uint8), int(np.prod(stored[name])), quantised)
        else:
            writer.add_tensor_info(name, extent, np.dtype(np.float32), 4 * extent[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    noise = blocks(kind, size).reshape(-1)
    for name, extent in tensors.items():
        matrix = name in stored
        writer.write_tensor_data(np.resize(noise, stored[name]) if matrix else np.ones(extent, np.float32))
    writer.close()


def blocks(kind: str, size: int) -> NDArray[np.uint8]:
    """Blocks of a format, uint8 [n, size]: random integers whose scales make values about N(0, 0.02^2)."""
    rng = np.random.default_rng(0)
    if kind == "F16":
        return (rng.standard_normal((1 << 22, 1), np.float32) * 0.02).astype(np.float16).view(np.uint8)
    found = rng.integers(0, 256, (100_003, size), np.uint8)
    # ggml-common.h: a block begins with its scale; in Q4_K with d and dmin, and a value is d * (0 to 63) * (0 to 15) -
    # dmin * (0 to 63).
    scales = [0.02 / 73] if kind == "Q8_0" else [0.011 / 31 / 4.6, 7.5 * 0.011 / 31 / 4.6]
    found[:, : 2 * len(scales)] = np.array(scales, np.float16).view(np.uint8)
    return found


def shapes(shape: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in gguf; no output.weight, since the head is tied."""
    d, k = shape["hidden_size"], shape["intermediate_size"]
    kv = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield "token_embd.weight", (shape["vocab_size"], d)
    yield "output_norm.weight", (d,)
    for layer in range(shape["num_hidden_layers"]):
        yield f"blk.{layer}.attn_norm.weight", (d,)
        yield f"blk.{layer}.ffn_norm.weight", (d,)
        for name, rows in (("q", d), ("k", kv), ("v", kv), ("output", d)):
            yield f"blk.{layer}.attn_{name}.weight", (rows, d)
        yield f"blk.{layer}.ffn_gate.weight", (k, d)
        yield f"blk.{layer}.ffn_up.weight", (k, d)
        yield f"blk.{layer}.ffn_down.weight", (d, k)


if __name__ == "__main__":
    serve(LlamaCpp)
