"""Maps on the device: what a step sees, and what may be overwritten while it does."""

import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tol.tables import HeldTable, make_table, open_pager, value
from tolserve.tol.arena import DeviceMap
from tolserve.tol.pager import Lease, Pager
from tolserve.tol.slotmap import SlotMap

SIZE = 3


class Copy:
    """A fill that copies until it is told to be through."""

    def __init__(self) -> None:
        self.through = False

    def query(self) -> bool:
        return self.through


changes = st.one_of(
    st.tuples(st.just("put"), st.integers(0, SIZE - 1), st.booleans()),
    st.tuples(st.just("remove"), st.integers(0, SIZE - 1)),
    st.tuples(st.just("arrive")),
    st.tuples(st.just("publish")),
    st.tuples(st.just("reset")),
)


@given(st.lists(changes, max_size=40))
@settings(max_examples=300)
def test_a_map_shows_what_is_there_as_of_the_last_publish(steps: list[tuple[object, ...]]) -> None:
    """Against the obvious: all records that are there, less those whose copy still ran when it was published."""
    shown: dict[int, int] = {}
    there: dict[int, tuple[int, Copy | None]] = {}
    slots = SlotMap(SIZE, "cpu")
    for place, (name, *rest) in enumerate(steps):
        if name == "put" and rest[0] not in there:
            token, copies = int(str(rest[0])), Copy() if rest[1] else None
            there[token] = place, copies
            slots.put(token, place, copies)  # type: ignore[arg-type]
        elif name == "remove" and rest[0] in there:
            del there[int(str(rest[0]))]
            slots.remove(int(str(rest[0])))
        elif name == "arrive":
            for _, copies in there.values():
                if copies is not None:
                    copies.through = True
        elif name == "publish":
            slots.publish(wait=False)
            shown = {token: at for token, (at, copies) in there.items() if copies is None or copies.through}
        elif name == "reset":
            there = {token: (token + 100, None) for token in there}
            slots.reset({token: at for token, (at, _) in there.items()})
            shown = {token: at for token, (at, _) in there.items()}
        expected = [shown.get(token, -1) for token in range(SIZE)]
        assert slots.seen.tolist() == expected
        assert slots.on_device.data.tolist() == expected


def test_places_without_memory_for_them_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError, match="do not fit on cpu"):
        DeviceMap(1 << 60, "cpu")
    table, _ = make_table(tmp_path / "tol")
    shared = set(Path("/dev/shm").glob("tolserve-*"))
    monkeypatch.setattr("tolserve.tol.shared.SlotMap", lambda size, device: SlotMap(1 << 60, device))
    with pytest.raises(MemoryError), open_pager(table, 2, 40, mapped=True):
        pass
    assert set(Path("/dev/shm").glob("tolserve-*")) <= shared


def test_what_is_gone_is_told_once() -> None:
    """It may be back before the next change, at a place that nothing tells of again."""
    slots = SlotMap(SIZE, "cpu")
    slots.put(0, 5, None)
    slots.publish(wait=False)
    slots.remove(0)
    slots.put(0, 7, None)
    for token in (1, 2):
        slots.publish(wait=False)
        assert slots.seen[0] == slots.on_device.data[0] == 7
        slots.put(token, token, None)


def test_a_step_that_runs_already_may_have_waited_for_a_slot(tmp_path: Path) -> None:
    """Its tokens are known when all slots are taken by reads that nobody waits for."""
    table = HeldTable(make_table(tmp_path / "tol")[0])
    with open_pager(table, 2, mapped=True) as (pager, metrics):
        with table.held() as go:
            assert pager.prefetch([0, 1]) == 2
            pager.publish()
            pager.launch_blind()
            threading.Timer(0.05, go.set).start()
            lease = pager.settle([2])
        assert lease.unreported > 0.01
        assert value(metrics, "tol_stall_seconds_total") == lease.unreported
        assert value(metrics, "tol_stalled_steps_total") == 1
        pager.release(lease, over=True)


View = tuple[memoryview, bytes]


def views_of(pager: Pager, token: int, record: bytes) -> list[View]:
    """The very bytes that a step reads a record from, part by part, and what they must be."""
    maps = pager.maps
    assert maps is not None
    assert maps.host is not None
    views = []
    for part, places in zip(pager.parts, maps.parts, strict=True):
        slot, at = int(places.on_device.data[token]), int(maps.host.on_device.data[token])
        where = part.arena.data[slot] if slot >= 0 else pager.host.memory.tensor()[at, part.offset :]
        views.append((memoryview(where[: part.bytes].numpy()), record[part.offset : part.offset + part.bytes]))
    return views


@pytest.mark.parametrize("head_factor", [None, 2.0])
@given(seed=st.integers(0, 2**32), slots=st.integers(8, 30), host=st.sampled_from([0, 5, 20, 40]))
@settings(max_examples=20)
def test_what_a_step_found_stays_there_until_it_is_over(
    tmp_path_factory: pytest.TempPathFactory, head_factor: float | None, seed: int, slots: int, host: int
) -> None:
    dice = random.Random(seed)
    table, records = make_table(tmp_path_factory.mktemp("table") / "tol", shape="grouped")
    flying: list[tuple[Lease, list[View]]] = []
    with open_pager(table, slots, host, mapped=True, head_factor=head_factor) as (pager, metrics):

        def release() -> None:
            pager.release(flying.pop(0)[0], over=True)

        def check() -> None:
            assert all(bytes(view) == want for _, views in flying for view, want in views)

        for _ in range(25):
            pager.publish(wait=dice.random() < 0.2)
            tokens = [dice.randrange(40) for _ in range(dice.randint(1, 3))]
            found = [token for token in dict.fromkeys(tokens) if pager.reach(token)]
            views = [view for token in found for view in views_of(pager, token, records[token].tobytes())]
            pager.launch_blind()
            with pytest.raises(RuntimeError, match="settle it"):
                pager.poll()
            flying.append((pager.settle(tokens), views))
            check()
            pager.prefetch([dice.randrange(40) for _ in range(4)])
            check()
            if len(flying) > 1:
                release()
            check()
            if dice.random() < 0.1:
                while flying:
                    release()
                pager.resize(device_slots=dice.randint(8, 30), host_slots=dice.randint(1, 20) if host < 40 else None)
        while flying:
            release()
        pager.preload([])
        pager.check()
        assert value(metrics, "tol_slots_pinned") == 0
