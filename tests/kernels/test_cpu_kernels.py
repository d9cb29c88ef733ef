"""The compiled CPU kernels against their twins: every level of instructions that this machine has, any threads, alone
or in a batch. What they compute is judged by test_gather.py and test_attention.py."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tolkernels import add_rows, chunk_attention, decode_attention, rms_norm, store_kv
from tolkernels.attention import chunk_attention_torch, decode_attention_torch, store_kv_torch
from tolkernels.cpu import isa, library
from tolkernels.dispatch import use_compiled
from tolkernels.gather import add_rows_torch, rms_norm_torch

if library() is None:
    pytest.skip("the CPU kernels are not built", allow_module_level=True)

from tolkernels.attention_cpu import chunk_attention_cpu, decode_attention_cpu, store_kv_cpu
from tolkernels.gather_cpu import add_rows_cpu, rms_norm_cpu

LEVELS = range(1, isa() + 1)
CACHE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
seeds = st.integers(0, 999)


@dataclass
class Layout:
    values: str
    group_size: int | None
    groups: int  # of 8 values where there are none

    @property
    def width(self) -> int:
        return self.groups * (self.group_size or 8)

    def table(self, slots: int, offset: int) -> Tensor:
        """Random rows at `offset` of slots somewhat longer than that: any bits as values, ordinary scales."""
        value_bytes = self.width * {"bf16": 16, "int8": 8, "int4": 4}[self.values] // 8
        scales = 0 if self.group_size is None else self.groups
        data = torch.randint(256, (slots, offset + value_bytes + 2 * scales + 6), dtype=torch.uint8)
        numbers = data[:, offset + (value_bytes if scales else 0) :].view(torch.bfloat16)
        numbers.copy_(torch.randn(numbers.shape))
        return data

    def arguments(self, offset: int) -> dict[str, object]:
        return {"offset": offset, "values": self.values, "group_size": self.group_size}


layouts = st.one_of(
    st.builds(Layout, st.just("bf16"), st.none(), st.integers(1, 40)),
    st.builds(Layout, st.just("int8"), st.sampled_from([2, 6, 16, 64]), st.integers(1, 9)),
    st.builds(Layout, st.just("int4"), st.sampled_from([4, 12, 32, 64]), st.integers(1, 9)),
    st.builds(Layout, st.just("int4"), st.sampled_from([1, 3]), st.sampled_from([4, 20])),  # bytes of two groups
)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert found.dtype == expected.dtype
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=60)
@given(
    layout=layouts,
    offset=st.integers(0, 20),
    tokens=st.integers(0, 9),
    with_host=st.booleans(),
    scaled=st.booleans(),
    seed=seeds,
)
def test_rows_are_added_as_the_twin_does_bit_for_bit(
    layout: Layout, offset: int, tokens: int, with_host: bool, scaled: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    scale = torch.randn(tokens) if scaled else None
    data, host = layout.table(5, 2 * offset), layout.table(3, 2 * offset) if with_host else None
    slots = torch.randint(-3 if with_host else 0, 5, (tokens,))
    stream, weight = torch.randn(tokens, 2 * layout.width)[:, : layout.width], torch.randn(layout.width)
    arguments = layout.arguments(2 * offset)
    total, normed = add_rows_torch(data, slots, stream, weight, EPS, **arguments, host=host, scale=scale)
    for level in LEVELS:
        found = add_rows_cpu(data, slots, stream, weight, EPS, **arguments, host=host, scale=scale, level=level)
        assert torch.equal(found[0], total)
        close(found[1], normed)
        assert torch.equal(rms_norm_cpu(total, weight, EPS, level=level), found[1])
    close(rms_norm(stream, weight, EPS), rms_norm_torch(stream, weight, EPS))


@pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
def test_a_tokens_row_and_norm_are_its_own(values: str) -> None:
    """In a batch large enough for threads, with any number of them, and alone: the same bits."""
    torch.manual_seed(2)
    layout = Layout(values, None, 256) if values == "bf16" else Layout(values, 64, 32)
    data, slots = layout.table(50, 0), torch.randint(50, (40,))
    stream, weight = torch.randn(40, layout.width), torch.randn(layout.width)
    for level in LEVELS:
        batch = add_rows_cpu(data, slots, stream, weight, EPS, **layout.arguments(0), level=level, threads=1)
        norms = rms_norm_cpu(stream, weight, EPS, level=level, threads=1)
        for threads in (2, 3, 8):
            again = add_rows_cpu(data, slots, stream, weight, EPS, **layout.arguments(0), level=level, threads=threads)
            assert all(torch.equal(*pair) for pair in zip(batch, again, strict=True))
            assert torch.equal(rms_norm_cpu(stream, weight, EPS, level=level, threads=threads), norms)
        for t in (0, 17, 39):
            one = slice(t, t + 1)
            alone = add_rows_cpu(data, slots[one], stream[one], weight, EPS, **layout.arguments(0), level=level)
            assert all(torch.equal(a, b[one]) for a, b in zip(alone, batch, strict=True))


@dataclass
class Paged:
    """Sequences in a cache whose other places hold NaN."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor

    def row(self, b: int) -> "Paged":
        return Paged(self.keys, self.values, self.tables[b : b + 1], self.lengths[b : b + 1])

    def attend(self, q: Tensor, **how: int) -> Tensor:
        return decode_attention_cpu(q, self.keys, self.values, self.tables, self.lengths, **how)

    def twin(self, q: Tensor) -> Tensor:
        """It reads what it masks, so NaN must go first."""
        keys, values = (cache.nan_to_num(0) for cache in (self.keys, self.values))
        return decode_attention_torch(q, keys, values, self.tables, self.lengths)


def paged(lengths: list[int], kv_heads: int, size: int, block_size: int, dtype: torch.dtype) -> Paged:
    used = [-(-length // block_size) for length in lengths]
    order = (torch.randperm(sum(used)) + 1).to(torch.int32)
    tables = torch.zeros((len(lengths), max(used) + 1), dtype=torch.int32)
    keys, values = torch.full((2, sum(used) + 1, block_size, kv_heads, size), torch.nan, dtype=dtype)
    for b, (count, length) in enumerate(zip(used, lengths, strict=True)):
        tables[b, :count], order = order[:count], order[count:]
        for cache in (keys, values):
            rows = torch.full((count * block_size, kv_heads, size), torch.nan)
            rows[:length] = torch.randn(length, kv_heads, size)
            cache[tables[b, :count].long()] = rows.to(dtype).view(count, block_size, kv_heads, size)
    return Paged(keys, values, tables, torch.tensor(lengths, dtype=torch.int32))


@settings(max_examples=40)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 70), st.sampled_from([63, 64, 65, 128, 200])), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    size=st.sampled_from([2, 30, 64, 80, 128, 256]),
    block_size=st.sampled_from([1, 7, 16, 100]),
    dtype=st.sampled_from(CACHE_DTYPES),
    seed=seeds,
)
def test_decoding_is_the_twins_and_reads_nothing_past_a_length(
    lengths: list[int], kv_heads: int, group: int, size: int, block_size: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    cache = paged(lengths, kv_heads, size, block_size, dtype)
    q = torch.randn(len(lengths), 2 * kv_heads * group, size)[:, ::2]
    for level in LEVELS:
        close(cache.attend(q, level=level), cache.twin(q), 1e-5)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "size"), [(12, 1, 64), (3, 6, 128), (1, 1, 40)])
def test_a_sequences_attention_is_its_own(dtype: torch.dtype, kv_heads: int, group: int, size: int) -> None:
    torch.manual_seed(3)
    cache = paged([300, 1, 64, 517, 16], kv_heads, size, 16, dtype)
    q = torch.randn(5, kv_heads * group, size)
    for level in LEVELS:
        batch = cache.attend(q, level=level, threads=1)
        for threads in (2, 3, 8):
            assert torch.equal(cache.attend(q, level=level, threads=threads), batch)
        for b in range(5):
            assert torch.equal(cache.row(b).attend(q[b : b + 1], level=level), batch[b : b + 1])


@settings(max_examples=40)
@given(
    length=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 200])),
    count=st.integers(1, 200),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    size=st.sampled_from([2, 30, 64, 80, 128]),
    block_size=st.sampled_from([1, 7, 16, 100]),
    dtype=st.sampled_from(CACHE_DTYPES),
    seed=seeds,
)
def test_a_chunk_attends_as_the_twin_does_and_reads_nothing_past_its_end(
    length: int, count: int, kv_heads: int, group: int, size: int, block_size: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    cache, count = paged([length], kv_heads, size, block_size, dtype), min(count, length)
    q, table = torch.randn(count, 2 * kv_heads * group, size)[:, ::2], cache.tables[0]
    expected = chunk_attention_torch(q, cache.keys, cache.values, table, length)
    assert torch.equal(expected.isnan(), torch.zeros_like(q, dtype=torch.bool))
    for level in LEVELS:
        close(chunk_attention_cpu(q, cache.keys, cache.values, table, length, level=level), expected, 1e-5)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "size"), [(3, 1, 64), (1, 2, 40)])
def test_a_tokens_attention_is_the_same_in_any_chunk(dtype: torch.dtype, kv_heads: int, group: int, size: int) -> None:
    """However a prompt is split, with any number of threads."""
    torch.manual_seed(4)
    cache, q = paged([300], kv_heads, size, 16, dtype), torch.randn(300, kv_heads * group, size)
    for level in LEVELS:

        def attend(start: int, end: int, threads: int = 2, level: int = level) -> Tensor:
            keys, values, table = cache.keys, cache.values, cache.tables[0]
            return chunk_attention_cpu(q[start:end], keys, values, table, end, level=level, threads=threads)

        whole = attend(0, 300)
        assert all(torch.equal(attend(0, 300, threads), whole) for threads in (1, 3, 8))
        for cuts in ([0, 1, 64, 65, 300], [0, 130, 163, 299, 300], [0, 17, 34, 51, 300]):
            parts = [attend(start, end) for start, end in pairwise(cuts)]
            assert torch.equal(torch.cat(parts), whole)


def test_decoding_is_a_chunk_of_one() -> None:
    torch.manual_seed(6)
    cache, q = paged([150], 2, 64, 16, torch.bfloat16), torch.randn(1, 6, 64)
    found = chunk_attention(q, cache.keys, cache.values, cache.tables[0], 150)
    close(found, decode_attention(q, cache.keys, cache.values, cache.tables, cache.lengths), 1e-5)


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 6),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    size=st.sampled_from([2, 30, 64, 128]),
    dtype=st.sampled_from(CACHE_DTYPES),
    magnitude=st.sampled_from([1.0, 1e-6, 1e30]),
    seed=seeds,
)
def test_storing_is_the_twins(
    tokens: int, heads: tuple[int, int], size: int, dtype: torch.dtype, magnitude: float, seed: int
) -> None:
    torch.manual_seed(seed)
    kv_heads, group = heads
    qkv = torch.randn(tokens, (2 + group) * kv_heads * size) * magnitude
    angles = torch.randn(tokens, size)
    places = torch.randperm(3 * 4)[:tokens]
    found = torch.randn(2, 3, 4, kv_heads, size).to(dtype)
    expected = found.clone()
    arguments = (qkv, angles.cos(), angles.sin(), places)
    assert torch.allclose(
        store_kv_cpu(*arguments, *found), store_kv_torch(*arguments, *expected), rtol=1e-5, atol=2e-6 * magnitude
    )
    assert torch.equal(found[1], expected[1])  # values are rounded alone
    last_place = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    atol = max(2e-6 * magnitude, 2.0**-24 if dtype == torch.float16 else 0)
    assert torch.allclose(found[0].float(), expected[0].float(), rtol=last_place, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_stored_and_read_as_torch_does(dtype: torch.dtype) -> None:
    """One value through storing, then as the only position of a sequence, where attention returns it."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = torch.stack((bits.float(), torch.nextafter(bits.float(), torch.tensor(torch.inf))), 1).view(-1, 1, 4)
    midway = (bits[:-1].float() + bits[1:].float()) / 2  # ties
    values = torch.cat((values, midway[: 4 * (len(midway) // 4)].view(-1, 1, 4)))
    count = len(values)
    cache = torch.zeros(2, count, 1, 1, 4, dtype=dtype)
    qkv = torch.cat((torch.zeros(count, 2, 4), values), 1).flatten(1)
    store_kv_cpu(qkv, torch.ones(count, 4), torch.zeros(count, 4), torch.arange(count), *cache)
    expected = values.to(dtype)
    assert torch.equal(cache[1].view(-1, 1, 4).nan_to_num(7), expected.nan_to_num(7))
    tables = torch.arange(count, dtype=torch.int32).view(-1, 1)
    for level in LEVELS:
        found = decode_attention_cpu(
            torch.zeros(count, 1, 4), *cache, tables, torch.ones_like(tables[:, 0]), level=level
        )
        assert torch.equal(found.nan_to_num(7), expected.float().nan_to_num(7))


def test_storing_does_not_depend_on_threads() -> None:
    torch.manual_seed(5)
    qkv, angles, places = torch.randn(60, 12 * 64), torch.randn(60, 64), torch.randperm(64)[:60]
    caches = torch.zeros(3, 2, 4, 16, 3, 64, dtype=torch.bfloat16)
    found = [
        store_kv_cpu(qkv, angles.cos(), angles.sin(), places, *cache, threads=threads)
        for cache, threads in zip(caches, (1, 2, 7), strict=True)
    ]
    assert all(torch.equal(q, found[0]) for q in found)
    assert all(torch.equal(cache, caches[0]) for cache in caches)


@pytest.mark.parametrize("slot", [5, -1, -4, 2**40, -(2**40)])
def test_a_slot_out_of_range_is_refused(slot: int) -> None:
    layout = Layout("bf16", None, 2)
    data, slots, stream, weight = layout.table(5, 0), torch.tensor([0, slot]), torch.zeros(2, 16), torch.ones(16)
    host = None if slot == -1 else layout.table(3, 0)
    with pytest.raises(IndexError, match=f"slot {slot} of token 1"):
        add_rows(data, slots, stream, weight, EPS, **layout.arguments(0), host=host)


@pytest.mark.parametrize("place", [-1, 32])
def test_a_place_out_of_range_is_refused_before_anything_is_written(place: int) -> None:
    cache = torch.zeros(2, 2, 16, 1, 4)
    with pytest.raises(IndexError, match=f"place {place} of token 1"):
        store_kv(torch.ones(2, 12), torch.ones(2, 4), torch.ones(2, 4), torch.tensor([3, place]), *cache)
    assert not cache.any()


@pytest.mark.parametrize(("length", "block"), [(0, 0), (-1, 0), (33, 0), (17, -1), (17, 2), (32, 2**31 - 1)])
def test_a_length_or_block_out_of_range_is_refused(length: int, block: int) -> None:
    keys, values = torch.zeros(2, 2, 16, 1, 4)
    tables = torch.tensor([[0, 1], [1, block]], dtype=torch.int32)
    lengths = torch.tensor([1, length], dtype=torch.int32)
    with pytest.raises(IndexError, match="of sequence 1"):
        decode_attention(torch.zeros(2, 1, 4), keys, values, tables, lengths)


@pytest.mark.parametrize("block", [-1, 2])
def test_a_chunks_block_out_of_range_is_refused(block: int) -> None:
    table = torch.tensor([0, block, -1], dtype=torch.int32)
    keys, values = torch.zeros(2, 2, 16, 1, 4)
    chunk_attention(torch.zeros(3, 1, 4), keys, values, table, 16)  # it has one block alone
    with pytest.raises(IndexError, match="out of range"):
        chunk_attention(torch.zeros(3, 1, 4), keys, values, table, 17)


def test_what_a_chunk_cannot_be_is_refused_by_name() -> None:
    keys, values = torch.zeros(2, 2, 16, 1, 4)
    good = {"q": torch.zeros(3, 1, 4), "table": torch.zeros(2, dtype=torch.int32), "length": 16}
    for name, value in {
        "q": torch.zeros(3, 1, 5),
        "table": torch.zeros(2, dtype=torch.int64),
        "length": 2,
    }.items():
        with pytest.raises(ValueError, match=name):
            chunk_attention(keys=keys, values=values, **good | {name: value})
    with pytest.raises(ValueError, match="length"):
        chunk_attention(keys=keys, values=values, **good | {"length": 33})


@pytest.mark.parametrize(("group", "size"), [(128, 1024), (1, 1026), (1, 16384), (129, 4), (2000, 1024)])
def test_heads_of_any_size_are_computed(group: int, size: int) -> None:
    """The largest in the kernels, whose stack has an end, and larger ones in the twins."""
    torch.manual_seed(0)
    cache, qkv = paged([70], 1, size, 16, torch.bfloat16), torch.randn(3, (group + 2) * size)
    angles, places = torch.randn(3, size), torch.tensor([1, 2, 3])
    q = store_kv(qkv, angles.cos(), angles.sin(), places, *(torch.zeros_like(cache.keys) for _ in range(2)))
    held = cache.keys.nan_to_num(0), cache.values.nan_to_num(0)  # twins read what they mask
    close(decode_attention(q[:1], *held, cache.tables, cache.lengths), cache.twin(q[:1]), 1e-5)
    rows = (*held, cache.tables[0], 70)
    close(chunk_attention(q, *rows), chunk_attention_torch(q, *rows), 1e-5)


def test_who_computes_in_another_precision_keeps_the_twin() -> None:
    assert use_compiled(torch.zeros(1))
    assert not use_compiled(torch.zeros(1, dtype=torch.bfloat16))
    assert not use_compiled(torch.zeros(1, device="meta"))
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, torch.ones(8), EPS), rms_norm_torch(x, torch.ones(8), EPS))
