"""A token's record, read as people see it: compared with the rows themselves, in numpy."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from engine.driver import OpenEngine, request, serve
from tiny import tiny_config
from tol.tables import flip_byte, value
from tolserve.engine import inspect
from tolserve.engine.assemble import find_table
from tolserve.engine.config import EngineSettings
from tolserve.engine.inspect import inspect_table, look_up
from tolserve.engine.look import Frequency, LookError, Scored, TokenView
from tolserve.model.build import BuildOptions, build_table
from tolserve.model.config import ModelConfig
from tolserve.tol.table import RecordError, Table

VOCAB = 300
Rows = npt.NDArray[np.float64]


def bf16_rows(table: Table) -> Rows:
    """All rows [layers, V, d] of a bf16 table, straight from its bytes."""
    records = np.stack([table.read_record(token) for token in range(VOCAB)])
    bits = torch.from_numpy(records).view(torch.bfloat16).double().numpy()
    return bits.reshape(VOCAB, len(table.manifest.layers), -1).transpose(1, 0, 2)


def assert_scored(found: list[Scored], expected: Rows, best: int, tolerance: float = 1e-3) -> None:
    """The lists' values are those of their tokens, best first, and none that is left out is better."""
    values = [expected[each.token] for each in found]
    assert [each.value for each in found] == pytest.approx(values, abs=tolerance)
    assert (best * np.diff(values) <= tolerance).all()
    left = np.delete(expected, [each.token for each in found])
    assert (best * left <= best * values[-1] + tolerance).all()


def assert_reads(view: TokenView, rows: Rows, model_dir: Path, among: list[int]) -> None:
    weights = {name: w.double().numpy() for name, w in load_file(model_dir / "model.safetensors").items()}
    head, norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
    others = [token for token in among if token != view.token]
    assert view.compared == len(others)
    for row in view.layers:
        mine, all_of_layer = rows[row.layer][view.token], rows[row.layer]
        assert row.norm == pytest.approx(np.linalg.norm(mine), rel=1e-5)
        spoken = head @ (mine * norm)
        assert_scored(row.promotes, spoken, +1)
        assert_scored(row.suppresses, spoken, -1)
        norms = np.linalg.norm(all_of_layer, axis=1)
        cosines = np.full(VOCAB, -2.0)
        cosines[others] = (all_of_layer @ mine / norms / norms[view.token])[others]
        assert_scored(row.nearest, cosines, +1, 1e-5)
        ranked = np.sort(norms[others])
        assert row.median_norm == pytest.approx(ranked[(len(ranked) - 1) // 2], rel=1e-5)


@pytest.fixture(scope="module")
def settings(tiny_model_dir: Path, cache_dir: Path) -> EngineSettings:
    return EngineSettings(model=str(tiny_model_dir), cache_dir=str(cache_dir), device="cpu")


@pytest.fixture(scope="module")
def rows(settings: EngineSettings) -> Rows:
    return bf16_rows(find_table(settings, Path(settings.model), ModelConfig.load(Path(settings.model))))


def look_offline(settings: EngineSettings, token: int, **changes: object) -> TokenView:
    options = {"layers": None, "top": 5, "counts": None, "nearest": True, "progress": None}
    return inspect_table(settings, token, **options | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [0, 7, VOCAB - 1])
def test_a_record_is_read_beside_the_whole_table(
    settings: EngineSettings, rows: Rows, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "_VALUES_AT_ONCE", 256 * 32 + 31)
    seen: list[tuple[int, int]] = []
    view = look_offline(settings, token, progress=lambda done, total: seen.append((done, total)))
    assert [row.layer for row in view.layers] == [0, 1]
    assert all(len(row.promotes) == len(row.suppresses) == len(row.nearest) == 5 for row in view.layers)
    assert_reads(view, rows, Path(settings.model), list(range(VOCAB)))
    assert seen == [(256, VOCAB), (VOCAB, VOCAB)]
    assert view.tier is None


def test_layers_and_comparison_may_be_left_out(settings: EngineSettings) -> None:
    counts = np.zeros(VOCAB, np.int64)
    counts[[3, 4, 5, 6]] = [10, 30, 10, 50]
    view = look_offline(settings, 5, layers=[1, 1], nearest=False, top=400, counts=counts)
    (row,) = view.layers
    assert (row.layer, row.median_norm, row.nearest, view.compared) == (1, None, [], 0)
    assert len(row.promotes) == VOCAB
    assert view.frequency == Frequency(10, 0.1, 3)
    assert look_offline(settings, 5, nearest=False, counts=counts * 0).frequency is None


def test_what_cannot_be_asked_is_refused(
    settings: EngineSettings, model_dir_of: Callable[[ModelConfig], Path], engine_of: OpenEngine
) -> None:
    with pytest.raises(LookError, match="layer 2 does not exist; the model has 2"):
        look_offline(settings, 5, layers=[0, 2])
    with pytest.raises(LookError, match="no token 300"):
        look_offline(settings, VOCAB)
    base = model_dir_of(tiny_config("base"))
    with pytest.raises(LookError, match="base model"):
        look_offline(EngineSettings(model=str(base), cache_dir=settings.cache_dir, device="cpu"), 5)
    with engine_of(model_dir=base) as engine, pytest.raises(LookError, match="base model"):
        look_up(engine.runner, 5, None, 3)
    with engine_of(device_cache="16") as engine:
        for token in (-1, VOCAB):
            with pytest.raises(ValueError, match="not all among"):
                look_up(engine.runner, token, None, 3)
        with pytest.raises(LookError, match="layer 9"):
            look_up(engine.runner, 5, [9], 3)


@pytest.mark.parametrize("options", [{}, {"host_cache": "40"}, {"host_cache": "100%"}])
def test_a_look_disturbs_nothing_and_names_the_tier(
    engine_of: OpenEngine, tiny_model_dir: Path, rows: Rows, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of records in every tier: the same counters, the same order of eviction, the same records as before."""
    monkeypatch.setattr(inspect, "_VALUES_AT_ONCE", 7 * 32)
    with engine_of(device_cache="16", tol_policy="lru", **options) as engine:
        pager = engine.pager
        assert pager is not None
        serve(engine, [request("a", range(20, 50), 1), request("b", range(40, 60), 2)])
        pager.preload([])  # nothing is on its way
        orders = [list(policy.keys()) for policy in pager._tiers.policies()]
        engine.refresh_metrics()
        counted = deepcopy([m for m in engine.registry.snapshot() if m.name.startswith("tolserve_tol")])
        tiers = {}
        for token in range(15, 65):
            view = look_up(engine.runner, token, None, 4)
            tiers[token] = view.tier
            assert_reads(view, rows, tiny_model_dir, pager.latest(100))
        engine.refresh_metrics()
        assert [list(policy.keys()) for policy in pager._tiers.policies()] == orders
        assert [m for m in engine.registry.snapshot() if m.name.startswith("tolserve_tol")] == counted
        pager.check()
        device = set(pager.latest(100))
        assert {token for token, tier in tiers.items() if tier == "device"} == device
        below = {tiers[token] for token in tiers if token not in device}
        assert below == ({"disk"} if not options else {"host"} if options["host_cache"] == "100%" else {"host", "disk"})


def test_a_look_compares_with_no_more_than_its_share(engine_of: OpenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records evicted last, as many as have so many values in the layers asked for."""
    monkeypatch.setattr(inspect, "_VALUES_COMPARED", 10 * 2 * 32)
    with engine_of(device_cache="50", tol_policy="lru") as engine:
        serve(engine, [request("a", range(20, 50), 0)])
        assert look_up(engine.runner, 9, None, 50).compared == 10
        view = look_up(engine.runner, 9, [1], 50)
    assert {each.token for each in view.layers[0].nearest} == set(range(30, 50))


def test_an_empty_cache_compares_with_nothing(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="16") as engine:
        view = look_up(engine.runner, 9, None, 3)
    assert (view.compared, view.tier, view.layers[0].nearest, view.layers[0].median_norm) == (0, "disk", [], None)


def test_a_record_that_cannot_be_read_is_an_error(tiny_model_dir: Path, engine_of: OpenEngine, tmp_path: Path) -> None:
    table = tmp_path / "table"
    build_table(tiny_model_dir, table)
    flip_byte(Table.open(table), 33)
    with engine_of(device_cache="16", table=str(table)) as engine:
        with pytest.raises(RecordError, match="checksum"):
            look_up(engine.runner, 33, None, 3)
        assert look_up(engine.runner, 34, None, 3).tier == "disk"


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions("int8", group_size=8),
        BuildOptions("int4", group_size=8),
        BuildOptions(rank=24, dropped_layers=(1,)),
    ],
)
def test_every_encoding_is_read(
    tiny_model_dir: Path, engine_of: OpenEngine, rows: Rows, tmp_path: Path, options: BuildOptions
) -> None:
    """Rows of a coarser table are near the bf16 ones, and those of server and command are the same."""
    build_table(tiny_model_dir, tmp_path / "table", options)
    settings = EngineSettings(
        model=str(tiny_model_dir), cache_dir="/", table=str(tmp_path / "table"), any_encoding=True, device="cpu"
    )
    with engine_of(device_cache="100%", table=str(tmp_path / "table"), any_encoding=True) as engine:
        views = [look_up(engine.runner, 7, None, 5), look_offline(settings, 7)]
        assert [row.layer for row in views[0].layers] == ([0] if options.rank else [0, 1])
        assert views[0].compared == views[1].compared == VOCAB - 1
        for here, there in zip(views[0].layers, views[1].layers, strict=True):
            assert here.norm == there.norm == pytest.approx(np.linalg.norm(rows[here.layer][7]), rel=0.2)
            assert here.nearest == there.nearest
            assert here.median_norm == there.median_norm
            assert [each.token for each in here.promotes] == [each.token for each in there.promotes]
        if options.rank:
            with pytest.raises(LookError, match="layer 1 was dropped"):
                look_up(engine.runner, 7, [1], 3)


def test_the_servers_own_counts_say_how_frequent_a_token_is(engine_of: OpenEngine, tmp_path: Path) -> None:
    with engine_of(device_cache="16", tol_save_frequencies=str(tmp_path / "c.npz")) as engine:
        serve(engine, [request("a", [5, 5, 5, 6], 1)])
        assert value(engine.registry, "tol_lookups_total") == 2
        assert look_up(engine.runner, 5, None, 1, engine.frequencies()).frequency == Frequency(3, 0.75, 1)
    with engine_of(device_cache="16", tol_frequencies=str(tmp_path / "c.npz")) as engine:
        assert look_up(engine.runner, 6, None, 1, engine.frequencies()).frequency == Frequency(1, 0.25, 2)
    with engine_of(device_cache="16") as engine:
        assert engine.frequencies() is None
