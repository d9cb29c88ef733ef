"""The transformer once more, in float64 numpy, one token and one head at a time (paper eq. 2.4-2.6, section 4.2)."""

import numpy as np
import numpy.typing as npt

from tolserve.model.config import ModelConfig
from tolserve.model.transformer import Transformer

Array = npt.NDArray[np.float64]


def weights_of(model: Transformer) -> dict[str, Array]:
    return {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


class Reference:
    def __init__(self, config: ModelConfig, weights: dict[str, Array], alpha: float = 1.0) -> None:
        self.config, self.weights, self.alpha = config, weights, alpha

    def norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt(np.mean(x * x) + self.config.rms_norm_eps) * self.weights[name + ".weight"]

    def linear(self, x: Array, name: str) -> Array:
        return self.weights[name + ".weight"] @ x

    def swiglu(self, x: Array, name: str) -> Array:
        gate, up = self.linear(x, name + ".gate_proj"), self.linear(x, name + ".up_proj")
        return self.linear(silu(gate) * up, name + ".down_proj")

    def rotated(self, head: Array, position: int) -> Array:
        """Each pair (i, i + width/2) is a complex number, turned by position * theta^(-2i/width)."""
        half = len(head) // 2
        turn = np.exp(1j * position * self.config.rope_theta ** (-2 * np.arange(half) / len(head)))
        turned = (head[:half] + 1j * head[half:]) * turn
        return np.concatenate([turned.real, turned.imag])

    def attention(self, stream: list[Array], name: str) -> list[Array]:
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        q = [self.linear(x, name + ".q_proj").reshape(heads, -1) for x in stream]
        k = [self.linear(x, name + ".k_proj").reshape(kv_heads, -1) for x in stream]
        v = [self.linear(x, name + ".v_proj").reshape(kv_heads, -1) for x in stream]
        outputs = []
        for here in range(len(stream)):
            mixed = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                query = self.rotated(q[here][head], here)
                scores = np.array([query @ self.rotated(k[past][shared], past) for past in range(here + 1)])
                scores = np.exp((scores - scores.max()) / np.sqrt(len(query)))
                share = scores / scores.sum()
                mixed.append(sum(share[past] * v[past][shared] for past in range(here + 1)))
            outputs.append(self.linear(np.concatenate(mixed), name + ".o_proj"))
        return outputs

    def row(self, token: int, layer: int) -> Array:
        """FFN_L(norm_L(X_0)): what the table holds for a token."""
        name = f"model.layers.{layer}."
        embedding = self.weights["model.embed_tokens.weight"][token]
        return self.alpha * self.swiglu(self.norm(embedding, name + "memory_layernorm"), name + "memory")

    def after_attention(self, x: Array, token: int, layer: int) -> Array:
        name, variant = f"model.layers.{layer}.", self.config.ffn_variant
        if variant == "base":
            return x + self.swiglu(self.norm(x, name + "post_attention_layernorm"), name + "mlp")
        if variant == "memory":
            return x + self.row(token, layer)
        y = self.norm(x, name + "compute_layernorm")
        for index in range(self.config.flex_beta):
            y = self.linear(silu(y) if index else y, f"{name}compute.{index}")
        return x + y + self.row(token, layer)

    def logits(self, tokens: list[int]) -> Array:
        """[S, V] for one sequence of token ids."""
        embedding = self.weights["model.embed_tokens.weight"]
        stream = [embedding[token] for token in tokens]
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}."
            attended = self.attention([self.norm(x, name + "input_layernorm") for x in stream], name + "self_attn")
            pairs = zip(stream, attended, tokens, strict=True)
            stream = [self.after_attention(x + a, token, layer) for x, a, token in pairs]
        head = embedding if self.config.tie_word_embeddings else self.weights["lm_head.weight"]
        return np.stack([head @ self.norm(x, "model.norm") for x in stream])
