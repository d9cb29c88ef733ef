"""Our checkpoints in Hugging Face's transformers: the same logits, generation, and files that both sides read."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny import tiny_config
from tolserve.model.build import export
from tolserve.model.checkpoint import load_transformer
from tolserve.model.config import ConfigError, ModelConfig
from tolserve.model.transformer import Transformer, causal_attention, rotary_tables

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

CONFIGS = {
    "base": tiny_config("base"),
    "memory": tiny_config("memory"),
    "memory-untied": tiny_config("memory", tie_word_embeddings=False, rope_theta=500.0, rms_norm_eps=0.1),
    "flex": tiny_config("flex", flex_beta=3),
}
TOKENS = torch.tensor([[5, 5, 0, 299, 17, 5, 120, 64], [1, 2, 3, 4, 5, 6, 7, 8]])


def opened(folder: Path) -> "transformers.PreTrainedModel":
    import tolserve.model.hf as hf

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, hf.MemoryLLMForCausalLM)
    return model.requires_grad_(False)


def ours(folder: Path) -> Transformer:
    return load_transformer(folder, with_memory=True, dtype=torch.float32)


def greedy(model: Transformer, tokens: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_training_forms(name: str, model_dir_of: Callable[[ModelConfig], Path]) -> None:
    folder = model_dir_of(CONFIGS[name])
    assert torch.equal(opened(folder)(TOKENS).logits, ours(folder)(TOKENS))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_it_saves_our_loader_reads(name: str, model_dir_of: Callable[[ModelConfig], Path], tmp_path: Path) -> None:
    folder = model_dir_of(CONFIGS[name])
    opened(folder).save_pretrained(tmp_path)
    assert ours(tmp_path).config == ours(folder).config
    assert torch.equal(ours(tmp_path)(TOKENS), ours(folder)(TOKENS))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_takes_the_likeliest_tokens(
    name: str, use_cache: bool, model_dir_of: Callable[[ModelConfig], Path]
) -> None:
    folder = model_dir_of(CONFIGS[name])
    found = opened(folder).generate(TOKENS[:1], max_new_tokens=12, do_sample=False, use_cache=use_cache)
    assert torch.equal(found, greedy(ours(folder), TOKENS[:1], 12)[:, : found.shape[1]])
    assert found.shape[1] == 20 or found[0, -1] == 0  # it stops at the end of text


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name: str, model_dir_of: Callable[[ModelConfig], Path]) -> None:
    model = opened(model_dir_of(CONFIGS[name]))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    padded = model(TOKENS, attention_mask=mask).logits
    assert torch.allclose(padded[0, 3:], model(TOKENS[:1, 3:]).logits[0], atol=1e-4)
    assert torch.allclose(padded[1], model(TOKENS[1:]).logits[0], atol=1e-4)


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_prompt_may_come_in_pieces(cut: int, tiny_model_dir: Path) -> None:
    model = opened(tiny_model_dir)
    first = model(TOKENS[:, :cut])
    then = model(TOKENS[:, cut:], past_key_values=first.past_key_values)
    whole = torch.cat([first.logits, then.logits], dim=1)
    assert torch.allclose(whole, model(TOKENS, use_cache=False).logits, atol=1e-4)


def test_base_opens_as_llama(model_dir_of: Callable[[ModelConfig], Path]) -> None:
    folder = model_dir_of(CONFIGS["base"])
    llama = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    assert torch.allclose(llama(TOKENS).logits, ours(folder)(TOKENS), atol=1e-4)


@pytest.mark.parametrize("name", ["memory-untied", "flex"])
def test_an_exported_model_takes_its_rows_from_the_table(
    name: str, model_dir_of: Callable[[ModelConfig], Path], tmp_path: Path
) -> None:
    folder = model_dir_of(CONFIGS[name])
    export(folder, tmp_path / "serving")
    whole = ours(folder)
    rows = torch.stack([layer.memory_row(whole.model.embed_tokens.weight) for layer in whole.model.layers], dim=1)
    rounded = rows.bfloat16().float()  # what the table holds
    cos, sin = rotary_tables(whole.config, TOKENS.shape[1], TOKENS.device)
    hidden = whole.hidden(TOKENS, causal_attention(cos, sin), lambda layer, x: x + rounded[TOKENS, layer])
    found = opened(tmp_path / "serving")(TOKENS).logits
    assert torch.allclose(found, whole.logits(hidden), atol=1e-4)
    shutil.rmtree(tmp_path / "serving" / "tol")
    with pytest.raises(Exception, match="tol"):
        opened(tmp_path / "serving")


def test_the_loss_is_that_of_the_next_token(tiny_model_dir: Path) -> None:
    logits = ours(tiny_model_dir)(TOKENS)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    out = opened(tiny_model_dir)(TOKENS, labels=TOKENS, logits_to_keep=0)
    assert torch.allclose(out.loss, expected)


def test_what_is_not_computed_is_refused(tiny_model_dir: Path) -> None:
    import tolserve.model.hf as hf

    model = opened(tiny_model_dir)
    for name in ("inputs_embeds", "output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=name):
            model(TOKENS, **{name: True})
    with pytest.raises(ValueError, match=re.escape("[B, past + S]")):
        model(TOKENS, attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(ValueError, match="return_dict"):
        model(TOKENS, return_dict=False)
    static = transformers.StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="DynamicCache"):
        model(TOKENS, past_key_values=static)
    with pytest.raises(ValueError, match="DynamicCache"):
        model.generate(TOKENS, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ConfigError, match="rope"):
        hf.MemoryLLMConfig(rope_scaling={"type": "linear", "factor": 2})
