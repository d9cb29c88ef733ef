"""The command line: one command, each subcommand a thin call into a package.

Heavy packages are imported by the command that needs them, so that `--help` is quick and `serve`'s API process never
loads torch. Expected failures end with one line on standard error and a non-zero status, bugs with a traceback.
"""

import asyncio
import json
import re
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tolserve import __version__
from tolserve.settings import (
    GenerateSettings,
    InspectSettings,
    OptionError,
    Options,
    PackSettings,
    ServeSettings,
    TableBuildSettings,
    TableExportSettings,
    TableFreqSettings,
    TableInspectSettings,
    TablePlanSettings,
    TableReplaySettings,
    TableVerifySettings,
    TrainSettings,
)
from tolserve.study import commands as study


class _Bar:
    """A progress bar on standard error, driven by calls of (done, total)."""

    def __init__(self, title: str, unit: str = "record") -> None:
        self._bar = tqdm(desc=title, unit=unit, unit_scale=True)

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def serve(settings: ServeSettings) -> None:
    # A container's first process ignores the signal unless it asks for it; until uvicorn takes over, nothing has begun.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from tolserve.api.app import serve as run

    run(settings)


def generate(settings: GenerateSettings) -> None:
    asyncio.run(_generate(settings))


async def _generate(settings: GenerateSettings) -> None:
    from contextlib import aclosing

    from tolserve.api.generation import ChoiceText, Piece
    from tolserve.api.tokenizer import ModelFiles
    from tolserve.engine.client import EngineClient, EngineError
    from tolserve.engine.request import Request, SamplingParams

    files = ModelFiles.load(settings.model)
    prompt = files.tokenizer.encode(settings.prompt)
    sampling = SamplingParams(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        seed=secrets.randbits(64) if settings.seed is None else settings.seed,
        stop_token_ids=tuple(sorted(files.eos_token_ids)),
    )
    text = ChoiceText(files.tokenizer, (), files.eos_token_ids, include_stop=False)
    whole = Piece()
    engine = EngineClient(settings.engine_json())
    engine.start()
    try:
        while engine.ready is None:
            if engine.failure is not None:
                raise EngineError("dead", f"the engine could not start: {engine.failure}")
            await asyncio.sleep(0.02)
        async with aclosing(engine.generate(Request("generate", prompt.ids, sampling))) as deltas:
            async for delta in deltas:
                if (piece := text.feed(delta)) is not None:
                    whole.extend(piece)
                    if not settings.json_output:
                        print(piece.text, end="", flush=True)
    finally:
        await engine.stop()
    print(json.dumps(_generated(settings, whole)) if settings.json_output else "")


def _generated(settings: GenerateSettings, whole: Any) -> dict[str, Any]:
    usage = whole.usage._asdict() if whole.usage is not None else None
    return {"prompt": settings.prompt, "text": whole.text, "finish_reason": whole.finish_reason, "usage": usage}


def train(settings: TrainSettings) -> None:
    from dataclasses import fields

    import torch

    from tolserve.train.loop import Run, keep_freed_memory
    from tolserve.train.ranks import join
    from tolserve.train.recipe import Recipe

    keep_freed_memory()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    given = settings.model_dump(mode="json")
    recipe = {field.name: given[field.name] for field in fields(Recipe)} | {"data": tuple(given["data"])}
    with join(settings.device) as ranks:
        run = Run(settings.out, _train_shape(settings), Recipe(**recipe), ranks)
        run.train(settings.save_every)
        figures = run.finish()
    if ranks.first:
        _show(figures, settings.json_output)


def _train_shape(settings: TrainSettings) -> Any:
    """The shape of the model to train: of the checkpoint or the preset, where one is named, with what is given beside
    it; else as the options say."""
    from dataclasses import fields, replace

    from tolserve.model.config import ModelConfig
    from tolserve.model.presets import preset, variant_name
    from tolserve.train.start import shape_from

    names = {field.name for field in fields(ModelConfig)} & set(TrainSettings.model_fields)
    given = settings.model_dump(include=names & settings.model_fields_set)
    if settings.init_from is not None:
        size = given.get("intermediate_size")
        shape = shape_from(settings.init_from, settings.ffn_variant, settings.flex_beta, size)
        for name, value in given.items():
            if value != getattr(shape, name):
                raise OptionError(f"{settings.flag(name)} is {value}, but --init-from's is {getattr(shape, name)}")
        return shape
    if settings.preset is not None:
        shape = preset(settings.preset, variant_name(settings.ffn_variant, settings.flex_beta))
        return replace(shape, **given, max_position_embeddings=settings.length)
    return ModelConfig(**settings.model_dump(include=names), max_position_embeddings=settings.length)


def inspect(settings: InspectSettings) -> None:
    from contextlib import nullcontext

    from tolserve.api.tokenizer import ModelFiles
    from tolserve.engine.config import EngineSettings
    from tolserve.engine.inspect import inspect_table
    from tolserve.engine.look import render, to_json
    from tolserve.tol.frequencies import read_frequencies

    files = ModelFiles.load(settings.model)
    token = _token(files, "TOKEN", settings.token, as_text=settings.text)
    given = settings.frequencies
    where = settings.model_dump(mode="json", include={"model", "table", "cache_dir"})
    with _Bar("comparing") if settings.nearest else nullcontext() as bar:
        view = inspect_table(
            EngineSettings(**where, any_encoding=True),
            token,
            layers=[int(layer) for layer in settings.layers.split(",")] if settings.layers is not None else None,
            top=settings.top,
            counts=read_frequencies(given, files.vocab_size) if given is not None else None,
            nearest=settings.nearest,
            progress=bar,
        )
    label = files.tokenizer.label
    print(json.dumps(to_json(view, label), indent=2) if settings.json_output else render(view, label))


def table_build(settings: TableBuildSettings) -> None:
    from tolserve.model.build import BuildOptions, build_table, stamp
    from tolserve.tol.table import Table, describe

    out = settings.out or settings.model / "tol"
    dropped = tuple(int(layer) for layer in settings.drop_layers.split(",") if layer)
    options = BuildOptions(settings.encoding, settings.group_size, settings.rank, settings.energy, dropped)
    with _Bar("building") as bar:
        build_table(settings.model, out, options, force=settings.force, progress=bar)
    stamp(settings.model)
    _show(describe(Table.open(out)), settings.json_output)


def table_verify(settings: TableVerifySettings) -> None:
    from tolserve.tol.table import Table, verify

    table = Table.open(_table_dir(settings.table))
    with _Bar("verifying") as bar:
        verify(table, bar)
    _show({"path": str(table.path), "records": table.manifest.vocab_size, "ok": True}, settings.json_output)


def table_inspect(settings: TableInspectSettings) -> None:
    from tolserve.tol.table import Table, describe

    _show(describe(Table.open(_table_dir(settings.table))), settings.json_output)


def table_export(settings: TableExportSettings) -> None:
    from tolserve.model.build import export
    from tolserve.tol.table import Table, describe

    with _Bar("building") as bar:
        export(settings.model, settings.out, progress=bar)
    _show(describe(Table.open(settings.out / "tol")), settings.json_output)


def table_freq(settings: TableFreqSettings) -> None:
    import numpy as np

    from tolserve.tol.frequencies import write_frequencies
    from tolserve.train.data import read_documents
    from tolserve.train.tokenizer import read_tokenizer

    given = settings.tokenizer
    path = given / "tokenizer.json" if given.is_dir() else given
    if not path.is_file():
        raise OptionError(f"--tokenizer {given}: there is no {path}")
    tokenizer = read_tokenizer(path)
    counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
    documents = (text for path in settings.text for text in read_documents(path))
    for text in tqdm(documents, desc="counting", unit="document"):
        counts += np.bincount(tokenizer.encode(text, add_special_tokens=False).ids, minlength=len(counts))
    write_frequencies(settings.out, counts)
    figures = {"vocab_size": len(counts), "tokens": int(counts.sum()), "distinct": int(np.count_nonzero(counts))}
    _show({"path": str(settings.out), **figures}, settings.json_output)


def table_replay(settings: TableReplaySettings) -> None:
    from dataclasses import asdict

    from tolserve.tol.frequencies import most_frequent, read_frequencies
    from tolserve.tol.policy import NEED_FREQUENCIES
    from tolserve.tol.replay import Trace, interleave, render, replay
    from tolserve.tol.size import parse_cache_size

    given = settings.frequencies
    if given is not None and settings.policy not in NEED_FREQUENCIES:
        raise OptionError(f"--frequencies: {settings.policy} does not pin; it is for {' and '.join(NEED_FREQUENCIES)}")
    trace = Trace.load(settings.trace)
    steps = interleave(trace, settings.sequences)
    frequent = most_frequent(read_frequencies(given, trace.vocab_size) if given is not None else steps.counts())
    figures = []
    for size in [settings.cache] if settings.cache is not None else ["1%", "5%", "10%", "20%"]:
        # A size in bytes is refused by the settings, so a record's bytes do not matter.
        slots = parse_cache_size(size, 1, trace.vocab_size)
        with _Bar(f"replaying {size}", "step") as bar:
            figures.append(replay(steps, settings.sequences, slots, settings.policy, frequent, bar))
    if settings.json_output:
        rows = [asdict(figure) for figure in figures]
        print(json.dumps(rows if settings.cache is None else rows[0], indent=2))
    else:
        print(render(figures, trace.vocab_size))


def table_plan(settings: TablePlanSettings) -> None:
    from tolserve.engine.config import EngineSettings
    from tolserve.engine.footprint import footprint, ready_table
    from tolserve.model.config import ModelConfig
    from tolserve.tol.plan import BASE_NOTE, Memory, Plan, TableShape, render

    config = ModelConfig.load(settings.model)
    shared = set(EngineSettings.__dataclass_fields__) - {"device_cache"}
    engine = EngineSettings(**settings.model_dump(mode="json", include=shared))
    table = ready_table(engine, settings.model, config, settings.encoding) if config.has_memory else None
    held = vars(footprint(engine, config, table))
    shown = ("ffn_variant", "num_hidden_layers", "hidden_size", "vocab_size")
    model = {"path": str(settings.model)} | {name: getattr(config, name) for name in shown}
    if config.has_memory:
        if table is not None:
            shape = TableShape.of(table)
        else:
            shape = TableShape.to_be_built(settings.encoding or "bf16", **{name: model[name] for name in shown[1:]})
        memory = Memory(**held, host_cache=shape.slots(settings.host_cache) * shape.record_bytes)
        plan = _plan_tiers(settings, config, Plan(model, memory, shape), table)
    else:
        if given := settings.model_fields_set & {"trace", "frequencies", "table", "device_cache", "host_cache"}:
            raise OptionError(f"{settings.flag(min(given))}: a base model has no table")
        plan = Plan(model, Memory(**held), notes=[BASE_NOTE])
    print(json.dumps(plan.to_json(), indent=2) if settings.json_output else render(plan))


def _plan_tiers(settings: TablePlanSettings, config: Any, plan: Any, table: Any) -> Any:
    """The plan with the disk's speed, and what each device cache size would do."""
    from tolserve.tol.estimate import FromCounts, FromTrace
    from tolserve.tol.frequencies import read_frequencies
    from tolserve.tol.plan import add_tiers, cache_sizes, measure_disk
    from tolserve.tol.policy import NEED_FREQUENCIES
    from tolserve.tol.replay import Trace

    if settings.trace is not None and settings.frequencies is not None and settings.policy not in NEED_FREQUENCIES:
        raise OptionError(f"--frequencies: {settings.policy} does not pin, and --trace says the rest; give one of them")
    shape = plan.table
    ffn_bytes = 3 * 2 * config.num_hidden_layers * config.hidden_size * config.intermediate_size  # in bf16
    slots = cache_sizes(shape, ffn_bytes, settings.device_cache)
    host_slots = shape.slots(settings.host_cache)
    counts = None
    if settings.frequencies is not None:
        counts = read_frequencies(settings.frequencies, shape.vocab_size)
        if not counts.any():
            raise OptionError(f"--frequencies {settings.frequencies}: it holds no counts yet")
    estimate: FromTrace | FromCounts = FromCounts(counts, shape.vocab_size, settings.policy, host_slots)
    if settings.trace is not None:
        trace = Trace.load(settings.trace)
        estimate = FromTrace(trace, shape.vocab_size, settings.policy, host_slots, counts)
    disk = measure_disk(table) if table is not None else None
    with _Bar("planning", "size") as bar:
        return add_tiers(plan, slots, settings.sequences, settings.step_ms, disk, estimate, bar)


def pack(settings: PackSettings) -> None:
    from tolserve.api.tokenizer import ModelFiles
    from tolserve.model.checkpoint import read_fingerprint
    from tolserve.model.config import ModelConfig
    from tolserve.model.pack import PackError, Target, check_path, make_entries, write_pack

    check_path(settings.out)
    config, files = ModelConfig.load(settings.model), ModelFiles.load(settings.model)
    if not config.has_memory:
        raise PackError(f"{settings.model} is a base model: it has no table that a pack could change")
    shape = (config.vocab_size, config.num_hidden_layers, config.hidden_size)
    target = Target(read_fingerprint(settings.model), *shape)
    entries = make_entries(*_pack_tensors(settings, config, files), target)
    tokens = [{"id": token, "text": files.tokenizer.label(token)} for token in dict.fromkeys(entries.tokens.tolist())]
    layers = sorted(set(entries.layers.tolist()))
    names = ", ".join(repr(token["text"]) for token in tokens[:20]) + (", ..." if len(tokens) > 20 else "")
    about = settings.description or f"{_way(settings)} at layers {layers} for {names}"[:500]
    write_pack(settings.out, entries, target, about)
    what = {"path": str(settings.out), "description": about, "entries": len(entries.tokens), "bytes": entries.nbytes}
    _show(what | {"layers": layers, "tokens": tokens if settings.json_output else names}, settings.json_output)


def _pack_tensors(settings: PackSettings, config: Any, files: Any) -> tuple[Any, Any, Any, Any]:
    """What the pack is to hold, made in the one way that was asked for."""
    from tolserve.model.edits import Cell, embedding_of, rows_from, scaled_rows

    tokens = list(dict.fromkeys(_token(files, "--tokens", word) for word in settings.tokens))
    if settings.cell is not None and settings.layer is not None:
        cell = Cell.read(settings.model, settings.layer, settings.cell)
        if not (tokens := tokens or cell.strongest(settings.share)):
            raise OptionError(f"--cell {settings.cell}: its coefficient is 0 for every token; there is nothing to edit")
        token = _token(files, "--value-of", settings.value_of) if settings.value_of is not None else None
        value = embedding_of(settings.model, token) if token is not None else None
        return cell.edit(tokens, 1.0 if settings.times is None else settings.times, value)
    given = settings.layers
    layers = sorted({int(layer) for layer in given.split(",")}) if given else [*range(config.num_hidden_layers)]
    if layers[-1] >= config.num_hidden_layers:
        raise OptionError(f"--layers {given}: the model's layers are 0 to {config.num_hidden_layers - 1}")
    if settings.from_table is not None:
        return rows_from(settings.from_table, tokens, layers, config)
    return scaled_rows(tokens, layers, settings.scale or 0.0, config.hidden_size)


def _token(files: Any, flag: str, word: str, *, as_text: bool = False) -> int:
    """The id that a person means: digits are an id unless `as_text`, anything else a text that must be one token."""
    from tolserve.api.tokenizer import NotOneTokenError

    if not as_text and re.fullmatch("[0-9]{1,18}", word):
        if int(word) >= files.vocab_size:
            raise OptionError(f"{flag} {word}: token ids are below {files.vocab_size}")
        return int(word)
    try:
        found: int = files.tokenizer.only_id(word)
    except NotOneTokenError as error:
        raise OptionError(f"{flag} {word!r}: {error}") from error
    return found


def _way(settings: PackSettings) -> str:
    """What a pack does, for one who gave no --description."""
    if settings.from_table is not None:
        return f"rows of {settings.from_table.resolve().name}"
    if settings.cell is None:
        return f"rows times {settings.scale or 0:g}"
    value = f", its value that of {settings.value_of!r}" if settings.value_of is not None else ""
    return f"cell {settings.cell} times {1 if settings.times is None else settings.times:g}{value}"


def _table_dir(given: Path) -> Path:
    """A table's own folder, or the one that a model directory carries."""
    return given / "tol" if (given / "config.json").exists() else given


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        print(f"{key}: {value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{key}: {value}")


@dataclass(frozen=True)
class Command:
    settings: type[Options]
    run: Callable[[Any], None]


COMMANDS: dict[tuple[str, ...], Command] = {
    ("serve",): Command(ServeSettings, serve),
    ("generate",): Command(GenerateSettings, generate),
    ("inspect",): Command(InspectSettings, inspect),
    ("train",): Command(TrainSettings, train),
    ("table", "build"): Command(TableBuildSettings, table_build),
    ("table", "verify"): Command(TableVerifySettings, table_verify),
    ("table", "inspect"): Command(TableInspectSettings, table_inspect),
    ("table", "export"): Command(TableExportSettings, table_export),
    ("table", "freq"): Command(TableFreqSettings, table_freq),
    ("table", "plan"): Command(TablePlanSettings, table_plan),
    ("table", "replay"): Command(TableReplaySettings, table_replay),
    ("pack",): Command(PackSettings, pack),
    **{("study", name): Command(options, run) for name, (options, run) in study.COMMANDS.items()},
}


def _overview() -> str:
    lines = ["usage: tolserve COMMAND [OPTIONS]", "", "An inference server for MemoryLLM models.", "", "commands:"]
    for words, command in COMMANDS.items():
        lines.append(f"  {' '.join(words):<17} {(command.settings.__doc__ or '').splitlines()[0]}")
    lines += ["", "`tolserve COMMAND --help` explains a command's options; `tolserve --version` says which this is."]
    return "\n".join(lines)


def _is_expected(error: Exception) -> bool:
    """Our own error types and the operating system's speak to the user; anything else is a bug."""
    return isinstance(error, OSError) or type(error).__module__.startswith("tolserve.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong options, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words == ["--version"]:
        print(f"tolserve {__version__}")
        return 0
    name = next((tuple(words[:n]) for n in (1, 2) if tuple(words[:n]) in COMMANDS), None)
    if name is None:
        print(f"tolserve: unknown command {' '.join(words[:2])!r}; `tolserve --help` lists them", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        command.run(command.settings.load(words[len(name) :], " ".join(("tolserve", *name))))
    except OptionError as error:
        print(f"tolserve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"tolserve: {error}", file=sys.stderr)
        return 1
    return 0
