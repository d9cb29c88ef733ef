"""store_kv and decode_attention against float64, in their torch twins and in their Triton kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from closeness import DTYPES, ROUNDING, check, in_wider_rows
from tolkernels import decode_attention, store_kv
from tolkernels.attention import decode_attention_torch, store_kv_torch

CPU = torch.device("cpu")


@dataclass
class Cache:
    """Sequences whose blocks lie anywhere in a cache; what nobody owns is not even a number."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor

    def context(self, row: int) -> tuple[Tensor, Tensor]:
        """A sequence's keys and values [length, kv_heads, hd] in float64, one position at a time."""
        size, places = self.keys.shape[1], range(int(self.lengths[row]))
        at = [(int(self.tables[row, place // size]), place % size) for place in places]
        keys, values = (torch.stack([cache[b, i] for b, i in at]).double() for cache in (self.keys, self.values))
        return keys, values


def make_cache(lengths: list[int], block_size: int, spare: int, heads: int, size: int, dtype: torch.dtype) -> Cache:
    used = [-(-length // block_size) for length in lengths]
    order = (torch.randperm(sum(used)) + 1).tolist()
    tables = torch.zeros((len(lengths), max(used, default=0) + spare), dtype=torch.int32)
    for row, count in enumerate(used):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    keys, values = torch.randn(2, sum(used) + 1, block_size, heads, size).to(dtype)
    keys[0] = values[0] = torch.nan  # a block that no sequence owns, which tables name past their length
    for row, length in enumerate(lengths):
        if length % block_size:  # the rest of a block that was somebody else's before
            keys[tables[row, used[row] - 1], length % block_size :] = torch.nan
            values[tables[row, used[row] - 1], length % block_size :] = torch.nan
    return Cache(keys.clone(), values.clone(), tables, torch.tensor(lengths, dtype=torch.int32))


@dataclass
class Shape:
    kv_heads: int
    group: int
    size: int
    block_size: int


shapes = st.builds(
    Shape, st.integers(1, 3), st.integers(1, 5), st.sampled_from([2, 16, 60, 64, 100, 128]), st.sampled_from([1, 5, 16])
)


def check_attention(
    cache: Cache, group: int, dtype: torch.dtype, attend: Callable[..., Tensor], device: torch.device
) -> None:
    kv_heads, size = cache.keys.shape[2:]
    q = torch.randn(len(cache.lengths), 2 * group * kv_heads, size).to(dtype)[:, : group * kv_heads]
    tensors = (t.to(device) for t in (q, cache.keys, cache.values, cache.tables, cache.lengths))
    found = attend(*tensors)
    assert (found.shape, found.dtype) == (q.shape, dtype)
    for row in range(len(q)):
        keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in cache.context(row))
        scores = torch.einsum("hd,lhd->hl", q[row].double(), keys) / size**0.5
        shares = scores.softmax(1)
        expected = torch.einsum("hl,lhd->hd", shares, values)
        # Each score is off by float32's error of its sum; torch rounds shares to q's dtype as well.
        slack = scores.abs().max() * 2**-20 / ROUNDING[dtype]
        check(found[row], expected, torch.einsum("hl,lhd->hd", shares, values.abs()), dtype, 3 + 2 * float(slack))


@settings(max_examples=40)
@given(
    shape=shapes,
    lengths=st.lists(st.integers(1, 40), max_size=4),
    spare=st.integers(0, 2),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    seed=st.integers(0, 999),
)
def test_decoding_attends_over_a_sequences_own_blocks(
    device: torch.device,
    shape: Shape,
    lengths: list[int],
    spare: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    from tolkernels.attention_triton import decode_attention_triton

    torch.manual_seed(seed)
    cache = make_cache(lengths, shape.block_size, spare, shape.kv_heads, shape.size, dtypes[1])
    check_attention(cache, shape.group, dtypes[0], decode_attention_torch, CPU)
    check_attention(cache, shape.group, dtypes[0], decode_attention_triton, device)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("size", [64, 100])
def test_a_long_context_is_split_and_merged(device: torch.device, group: int, size: int) -> None:
    """With one sequence that is much shorter, so that most parts of it are empty."""
    from tolkernels.attention_triton import attention_tile, decode_attention_triton, split_count

    lengths, block_size = [395, 3], 16
    cache = make_cache(lengths, block_size, 1, 2, size, torch.float16)
    tile, _ = attention_tile(group, size)
    assert split_count(4, 26 * block_size, tile) >= 4
    check_attention(cache, group, torch.float16, decode_attention_triton, device)


def test_a_sharp_score_far_from_the_others_wins(device: torch.device) -> None:
    """Softmax must not overflow, nor lose what an earlier peak had."""
    from tolkernels.attention_triton import decode_attention_triton

    keys = torch.zeros(10, 16, 1, 32, device=device)
    keys[2, 5], keys[7, 1] = 50.0, -50.0
    values = torch.randn(10, 16, 1, 32, device=device)
    q = torch.full((1, 1, 32), 50.0, device=device)
    tables = torch.arange(10, dtype=torch.int32, device=device)[None]
    lengths = torch.tensor([160], dtype=torch.int32, device=device)
    for attend in (decode_attention_torch, decode_attention_triton):
        assert torch.equal(attend(q, keys, values, tables, lengths)[0, 0], values[2, 5, 0])


def test_what_lies_past_a_length_is_not_read_by_the_kernel(device: torch.device) -> None:
    from tolkernels.attention_triton import decode_attention_triton

    keys, values = torch.randn(2, 3, 16, 2, 32, device=device)
    q, tables = torch.randn(1, 2, 32, device=device), torch.tensor([[1, 2]], dtype=torch.int32, device=device)
    lengths = torch.tensor([17], dtype=torch.int32, device=device)
    expected = decode_attention_triton(q, keys, values, tables, lengths)
    keys[2, 1:], values[2, 1:], keys[0], values[0] = torch.nan, torch.nan, torch.nan, torch.nan
    assert torch.equal(decode_attention_triton(q, keys, values, tables, lengths), expected)
    keys[2, 0, 0] = torch.nan
    found = decode_attention_triton(q, keys, values, tables, lengths)
    assert found[0, 0].isnan().all()
    assert torch.equal(found[0, 1], expected[0, 1])


@settings(max_examples=40)
@given(
    shape=shapes,
    tokens=st.integers(0, 5),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    seed=st.integers(0, 999),
)
def test_keys_and_values_are_stored_where_they_belong(
    device: torch.device, shape: Shape, tokens: int, dtypes: tuple[torch.dtype, torch.dtype], seed: int
) -> None:
    from tolkernels.attention_triton import store_kv_triton

    torch.manual_seed(seed)
    kv_heads, heads, size = shape.kv_heads, shape.kv_heads * shape.group, shape.size
    width = (heads + 2 * kv_heads) * size
    qkv = in_wider_rows(torch.randn(tokens, width).to(dtypes[0]))
    angles = torch.randn(tokens, size // 2).repeat(1, 2) * 100
    cos, sin = angles.cos(), angles.sin()
    blocks = 2 + tokens // shape.block_size
    places = torch.randperm(blocks * shape.block_size)[:tokens]
    for store, where in ((store_kv_torch, CPU), (store_kv_triton, device)):
        before = torch.randn(2, blocks, shape.block_size, kv_heads, size).to(dtypes[1]).to(where)
        keys, values = before.clone()
        q = store(*(t.to(where) for t in (qkv, cos, sin, places)), keys, values)
        assert (q.shape, q.dtype) == ((tokens, heads, size), dtypes[0])
        flat = [cache.view(-1, kv_heads, size) for cache in (keys, values)]
        for token in range(tokens):
            rows = qkv[token].double().view(-1, size)
            first, second = rows[:, : size // 2], rows[:, size // 2 :]
            turned = rows * cos[token].double() + torch.cat((-second, first), 1) * sin[token].double()
            largest = torch.cat((first.abs() + second.abs(),) * 2, 1)
            check(q[token], turned[:heads], largest[:heads], dtypes[0])
            key, value = (cache[int(places[token])] for cache in flat)
            check(key, turned[heads : heads + kv_heads], largest[heads : heads + kv_heads], dtypes[1])
            check(value, rows[heads + kv_heads :], rows[heads + kv_heads :].abs(), dtypes[1])
        others = torch.ones(len(flat[0]), dtype=torch.bool, device=where)
        others[places.to(where)] = False
        for cache, old in zip(flat, before, strict=True):
            assert torch.equal(cache[others], old.view_as(cache)[others])


def good_attention() -> dict[str, Any]:
    cache = torch.zeros(3, 4, 2, 8)
    return {
        "q": torch.zeros(2, 4, 8),
        "keys": cache,
        "values": cache.clone(),
        "tables": torch.zeros(2, 3, dtype=torch.int32),
        "lengths": torch.ones(2, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.zeros(2, 3, 8)),
        ("q", torch.zeros(2, 4, 6)),
        ("q", torch.zeros(2, 32)),
        ("keys", torch.zeros(3, 4, 2, 7)),
        ("keys", torch.zeros(3, 8, 2, 8)[:, ::2]),
        ("values", torch.zeros(3, 4, 2, 8, dtype=torch.bfloat16)),
        ("tables", torch.zeros(2, 3, dtype=torch.int64)),
        ("tables", torch.zeros(1, 3, dtype=torch.int32)),
        ("lengths", torch.ones(2, dtype=torch.int64)),
        ("lengths", torch.ones(3, dtype=torch.int32)),
    ],
)
def test_attention_refuses_what_does_not_fit_by_name(name: str, value: Tensor) -> None:
    decode_attention(**good_attention())
    with pytest.raises(ValueError, match=name):
        decode_attention(**good_attention() | {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qkv", torch.zeros(2, 32)),
        ("qkv", torch.zeros(2, 65)),
        ("cos", torch.ones(2, 4)),
        ("sin", torch.ones(2, 8, dtype=torch.bfloat16)),
        ("places", torch.zeros(2, dtype=torch.int32)),
        ("places", torch.zeros(3, dtype=torch.int64)),
        ("values", torch.zeros(3, 4, 1, 8)),
    ],
)
def test_storing_refuses_what_does_not_fit_by_name(name: str, value: Tensor) -> None:
    cache = torch.zeros(3, 4, 2, 8)
    good = {"qkv": torch.zeros(2, 48), "cos": torch.ones(2, 8), "sin": torch.ones(2, 8), "keys": cache}
    good |= {"places": torch.tensor([3, 1]), "values": cache.clone()}
    store_kv(**good)
    with pytest.raises(ValueError, match=name):
        store_kv(**good | {name: value})
