"""transformers' LlamaForCausalLM as a peer, random weights.

On the CPU a dynamic cache, which is its default; on CUDA a static cache and torch.compile with CUDA graphs, which is
its fastest.
"""

from importlib.metadata import version
from typing import Any

import torch
from peer import serve
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache


class Transformers:
    def __init__(self, options: dict[str, Any]) -> None:
        """options: shape (a LLaMA's config.json), dtype, longest, threads, device."""
        torch.set_num_threads(options["threads"])
        self._device, self._longest = options["device"], options["longest"]
        self._config = LlamaConfig(**options["shape"])
        self._model = random_llama(self._config, getattr(torch, options["dtype"]), self._device)
        self._forward = self._model.forward
        if self._device == "cuda":
            self._forward = torch.compile(self._forward, mode="reduce-overhead", fullgraph=True)
        self._cache: Any = None
        self._position = 0

    @torch.inference_mode()
    def start(self, prompts: list[list[int]]) -> None:
        self._position = 0
        self._cache = None  # lets go of the old one first
        self._cache = (
            StaticCache(config=self._config, max_cache_len=self._longest)
            if self._device == "cuda"
            else DynamicCache(config=self._config)
        )
        self._run(self._model.forward, prompts)

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> None:
        self._run(self._forward, [[token] for token in tokens])

    def _run(self, forward: Any, tokens: list[list[int]]) -> None:
        """Prompts are of one length, so no position is padded."""
        ids = torch.tensor(tokens, device=self._device)
        at = torch.arange(self._position, self._position + ids.shape[1], device=self._device)
        options = {"past_key_values": self._cache, "use_cache": True, "logits_to_keep": 1}
        logits = forward(input_ids=ids, position_ids=at.expand(len(tokens), -1), **options).logits
        logits[:, -1].argmax(-1).tolist()  # waits for a GPU
        self._position += ids.shape[1]

    def facts(self) -> dict[str, Any]:
        element = self._model.dtype.itemsize
        width = self._config.num_key_value_heads * self._config.hidden_size // self._config.num_attention_heads
        weights = sum(p.numel() * p.element_size() for p in self._model.parameters())
        return {
            "version": f"transformers {version('transformers')}, torch {version('torch')}",
            "bytes": {"weights": weights, "kv_per_token": 2 * element * self._config.num_hidden_layers * width},
        }

    def use(self, **options: Any) -> None:
        raise RuntimeError(f"transformers has nothing to change: {options}")


def random_llama(config: LlamaConfig, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    model.to_empty(device=device)
    model.tie_weights()
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device, dtype)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        if parameter.ndim == 1:
            flat.fill_(1)
            continue
        for start in range(0, flat.numel(), noise.numel()):
            flat[start : start + noise.numel()] = noise[: flat.numel() - start]
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers were empty, too
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    serve(Transformers)
