"""A step's arrays against the chunks they are made of, token by token."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.driver import request
from tolserve.engine.inputs import step_inputs
from tolserve.engine.sequence import Chunk, Sequence

BLOCK_SIZE = 4


@st.composite
def chunk(draw: st.DrawFn, index: int) -> Chunk:
    """Some tokens of a sequence whose blocks may reach further than the chunk."""
    start, count = draw(st.integers(0, 30)), draw(st.sampled_from([1, 1, 1, 2, 5, 17]))
    length = start + count + draw(st.integers(0, 9))
    sequence = Sequence(request(str(index), draw(st.lists(st.integers(0, 999), min_size=length, max_size=length))), 0.0)
    blocks = -(-length // BLOCK_SIZE)
    sequence.blocks.extend(draw(st.lists(st.integers(0, 10_000), min_size=blocks, max_size=blocks)))
    return Chunk(sequence, start, count)


@given(data=st.data(), count=st.integers(1, 6))
def test_arrays_say_where_every_token_is(data: st.DataObject, count: int) -> None:
    chunks = [data.draw(chunk(index)) for index in range(count)]
    flat = [token for each in chunks for token in each.tokens]
    inputs = step_inputs(chunks, flat, BLOCK_SIZE, torch.device("cpu"))
    row = 0
    for index, each in enumerate(chunks):
        blocks = each.sequence.blocks
        for position in range(each.start, each.end):
            place = blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            found = (int(inputs.tokens[row]), int(inputs.positions[row]), int(inputs.places[row]))
            assert found == (each.sequence.tokens[position], position, place)
            row += 1
        assert inputs.tables[index].tolist() == [*blocks, *[0] * (inputs.tables.shape[1] - len(blocks))]
        assert int(inputs.lengths[index]) == each.end
    assert row == len(inputs.tokens) == len(inputs.positions) == len(inputs.places)
    assert inputs.tokens.dtype == inputs.positions.dtype == inputs.places.dtype == torch.int64
    assert inputs.tables.dtype == inputs.lengths.dtype == torch.int32
    assert inputs.tables.is_contiguous(), "kernels read it as it lies"
    assert inputs.lengths.is_contiguous()
