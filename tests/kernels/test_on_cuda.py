"""What only a CUDA device can show: the dispatch takes the Triton kernels there, and a CUDA graph may hold them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from closeness import check
from tolkernels import (
    add_rows,
    decode_attention,
    embedding_rows,
    linear,
    lookup_slots,
    make_weight,
    rms_norm,
    store_kv,
)
from tolkernels.attention import decode_attention_torch, store_kv_torch
from tolkernels.formats import Encoding
from tolkernels.gather import add_rows_torch
from tolkernels.linear import linear_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
TOKENS, HIDDEN, HEADS, SIZE, BLOCK, VOCABULARY = 8, 256, 4, 64, 16, 50


class Step:
    """Every kernel of a decode step once, out of buffers that stay."""

    def __init__(self) -> None:
        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

        self.tokens = torch.zeros(TOKENS, dtype=torch.int64, device="cuda")
        self.maps = torch.full((2, VOCABULARY), -1, dtype=torch.int32, device="cuda")
        self.places = torch.zeros(TOKENS, dtype=torch.int64, device="cuda")
        self.tables = torch.zeros((TOKENS, 8), dtype=torch.int32, device="cuda")
        self.lengths = torch.ones(TOKENS, dtype=torch.int32, device="cuda")
        self.angles = torch.rand(TOKENS, SIZE, device="cuda")
        self.keys, self.values = (randn(8 * TOKENS + 1, BLOCK, HEADS, SIZE) for _ in range(2))
        self.arena = randn(20, HIDDEN).view(torch.uint8)
        self.host = randn(20, HIDDEN).view(torch.uint8).cpu().pin_memory()
        self.stream, self.norm = randn(TOKENS, HIDDEN), torch.rand(HIDDEN, device="cuda")
        self.qkv, self.out = make_weight(randn(3 * HIDDEN, HIDDEN), "int8"), make_weight(randn(HIDDEN, HIDDEN), "int4")

    def fill(self, seed: int) -> None:
        """Other tokens in other places, of other lengths, some with rows nowhere."""
        torch.manual_seed(seed)
        self.tokens.copy_(torch.randint(VOCABULARY, (TOKENS,)))
        self.maps.copy_(torch.randint(-1, 20, (2, VOCABULARY)))
        self.tables.copy_(torch.randperm(8 * TOKENS).view(TOKENS, 8) + 1)
        self.lengths.copy_(torch.randint(1, 8 * BLOCK + 1, (TOKENS,)))
        last = self.lengths.long() - 1
        blocks = self.tables.long().gather(1, (last // BLOCK).unsqueeze(1)).squeeze(1)
        self.places.copy_(blocks * BLOCK + last % BLOCK)
        self.stream.normal_()

    def run(self) -> list[Tensor]:
        slots, missed = lookup_slots(self.tokens, self.maps[0], self.maps[1])
        h = rms_norm(self.stream, self.norm, 1e-5)
        q = store_kv(linear(h, self.qkv), self.angles, self.angles, self.places, self.keys, self.values)
        a = decode_attention(q, self.keys, self.values, self.tables, self.lengths)
        x = linear(a.flatten(1), self.out, self.stream)
        rows = {"offset": 0, "values": "bf16", "group_size": None, "host": self.host}
        x, h = add_rows(self.arena, slots, x, self.norm, 1e-5, **rows)
        return [slots, missed, q, a, x, h]


def test_a_graph_replays_with_other_slots_places_tables_and_lengths() -> None:
    step = Step()
    step.fill(0)
    step.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step.run()
    for seed in range(1, 6):
        step.fill(seed)
        before = step.keys.clone()
        graph.replay()
        found = [tensor.clone() for tensor in held]
        assert not torch.equal(step.keys, before)
        step.keys.copy_(before)
        assert all(torch.equal(a, b) for a, b in zip(found, step.run(), strict=True))


def test_nothing_waits_for_the_host() -> None:
    step = Step()
    step.fill(0)
    step.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_takes_the_kernels() -> None:
    """Their results differ from the twins' in last bits alone; rows are added to the twin's very bits."""
    step = Step()
    step.fill(3)
    slots, _, q, a, x, _ = step.run()
    qkv = linear(rms_norm(step.stream, step.norm, 1e-5), step.qkv)
    keys, values = step.keys.clone(), step.values.clone()
    twins = store_kv_torch(qkv, step.angles, step.angles, step.places, keys, values)
    check(q, twins.double().cpu(), 8.0 + twins.double().abs().cpu(), torch.bfloat16)
    attended = decode_attention_torch(q, step.keys, step.values, step.tables, step.lengths).double().cpu()
    check(a, attended, step.values.abs().max().item(), torch.bfloat16, 4)
    stream = linear(a.flatten(1), step.out, step.stream)
    rows = {"offset": 0, "values": "bf16", "group_size": None, "host": step.host}
    assert torch.equal(x, add_rows_torch(step.arena, slots, stream, step.norm, 1e-5, **rows)[0])


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 3, 16, 40, 64, 65, 300])
def test_linear_maps(encoding: Encoding, tokens: int) -> None:
    dtype = torch.float16 if encoding == "float16" else torch.bfloat16
    weight = make_weight(torch.randn(1000, 480, device="cuda"), encoding)
    matrix = embedding_rows(torch.arange(1000, device="cuda"), weight, torch.float32).double()
    x = torch.randn(tokens, 480, device="cuda").to(dtype)
    residual = torch.randn(tokens, 1000, device="cuda").to(dtype)
    exact = x.double() @ matrix.T
    size = x.double().abs() @ matrix.abs().T
    calls: list[tuple[Callable[..., Tensor], Tensor | None]] = [
        (linear, None),
        (linear, residual),
        (linear_torch, residual),
    ]
    for call, added in calls:
        old = added.double() if added is not None else torch.zeros_like(exact)
        check(call(x, weight, added), (exact + old).cpu(), (size + old.abs()).cpu(), dtype, 3)
