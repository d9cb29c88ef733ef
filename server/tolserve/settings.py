"""Every option of every command, in one place; those of studies are in study/settings.py.

An option has one name: the flag `--device-cache`, the environment variable `TOLSERVE_DEVICE_CACHE` and the key
`device-cache` (or `device_cache`) of a `--config` file, which is JSON or TOML. A flag wins over the environment, the
environment over the file, the file over the default. What no command knows is refused.
"""

import json
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ENV_PREFIX = "TOLSERVE_"
DEMO_MODEL = Path(__file__).parent / "demo_model"

_POSITIONAL = get_args(CliPositionalArg[str])[1]
_NUMBER = r"[0-9]+(\.[0-9]+)?"
_BYTES = _NUMBER + r" ?[KMGT]?i?B"


def _written_as(pattern: str, examples: str) -> AfterValidator:
    """Catches slips before a process is started; what the size comes to is the engine's to work out."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.IGNORECASE):
            raise ValueError(f"must be {examples}")
        return text

    return AfterValidator(check)


Bytes = Annotated[str, _written_as(rf"auto|{_BYTES}", "auto or bytes with a unit, such as 512MiB")]
ByteCount = Annotated[str, _written_as(_BYTES, "bytes with a unit, such as 256MiB")]
CacheSize = Annotated[
    str, _written_as(rf"[0-9]+|{_BYTES}|{_NUMBER}%", "records (12826), bytes with a unit (2GiB) or a share (10%)")
]
CacheSlots = Annotated[str, _written_as(rf"[0-9]+|{_NUMBER}%", "records (12826) or a share of the table (10%)")]
Positive = Annotated[int, Field(ge=1)]


def split(given: object) -> object:
    """`1,32` is a list in every source, so that an option of `serve` in the environment is one for `plan` as well."""
    parts = given if isinstance(given, list | tuple) else [given]
    return [word for part in parts for word in (part.split(",") if isinstance(part, str) else [part])]


CacheSizes = Annotated[tuple[CacheSize, ...], NoDecode, BeforeValidator(split)]
SequenceCounts = Annotated[
    tuple[Annotated[int, Field(ge=1, le=4096)], ...], NoDecode, BeforeValidator(split), Field(min_length=1)
]
TokenWords = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split)]
LayerNumbers = Annotated[str, _written_as(r"[0-9]{1,4}(,[0-9]{1,4})*", "layer numbers, such as 3,5")]
Factor = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
# Each takes two buffers of a record in RAM.
ReadDepth = Annotated[int, Field(ge=1, le=256)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

EncodingName = Literal["bf16", "int8", "int4", "lowrank", "lowrank-int8", "lowrank-int4"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
WeightsName = Literal["auto", "int8", "int4"]
PolicyName = Literal["lru", "s3fifo", "static", "half-pinned", "context"]


class OptionError(ValueError):
    """Options that cannot be used; the message names each, and where it was given."""


class Options(BaseSettings):
    """What all commands share. Keyword arguments are taken as they are; `load` reads the outside world."""

    model_config = SettingsConfigDict(
        extra="forbid",
        env_prefix=ENV_PREFIX,
        protected_namespaces=(),
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_shortcuts={"json-output": "json", "prompt": "p"},
    )

    config: Path | None = Field(None, description="JSON or TOML file with any of these options")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @classmethod
    def load(cls, argv: Sequence[str], prog: str) -> Self:
        """Merge flags, environment and file. Raises OptionError; argparse itself ends the process for unknown flags
        and for --help."""
        _refuse_unknown_environment()
        flags = CliSettingsSource(cls, cli_parse_args=list(argv), cli_prog_name=prog)()
        environment = EnvSettingsSource(cls)()
        path = flags.get("config") or environment.get("config")
        file = _read_file(Path(path)) if path else {}
        try:
            return cls(**(file | environment | flags))
        except ValidationError as error:
            raise OptionError("; ".join(cls._explain(e, flags, environment) for e in error.errors())) from None

    @classmethod
    def _explain(cls, error: Any, flags: dict[str, Any], environment: dict[str, Any]) -> str:
        if not error["loc"]:
            return str(error["msg"]).removeprefix("Value error, ")
        name = str(error["loc"][0])
        source = "" if name in flags else " (from the environment)" if name in environment else " (from --config)"
        if error["type"] == "missing":
            return f"{cls.flag(name)} is required"
        if error["type"] == "extra_forbidden":
            return f"unknown option {name!r}{source}"
        given = "" if name == "api_key" else f", not {error['input']!r}"
        return f"{cls.flag(name)}{source}: {str(error['msg']).removeprefix('Value error, ')}{given}"

    @classmethod
    def flag(cls, name: str) -> str:
        """How a person gives the option on the command line."""
        field = cls.model_fields.get(name)
        if field is not None and _POSITIONAL in field.metadata:
            return name.upper()
        return {"json_output": "--json", "from_table": "--from"}.get(name, "--" + name.replace("_", "-"))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        raw = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise OptionError(f"--config {path} cannot be read as JSON or TOML: {error}") from error
    if not isinstance(raw, dict) or "config" in raw:
        raise OptionError(f"--config {path} must hold one object of options, without 'config' itself")
    values = {key.replace("-", "_"): value for key, value in raw.items()}
    if len(values) < len(raw):
        raise OptionError(f"--config {path} gives an option twice, with '-' and with '_'")
    return values


def _all_commands(base: type[Options] = Options) -> list[type[Options]]:
    return [base] + [command for child in base.__subclasses__() for command in _all_commands(child)]


def _refuse_unknown_environment() -> None:
    """A misspelt variable must not be ignored; one of another command is fine, since a shell is shared."""
    known = {ENV_PREFIX + name.upper() for command in _all_commands() for name in command.model_fields}
    if unknown := sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known):
        raise OptionError(f"unknown environment variable {', '.join(unknown)}; `tolserve COMMAND --help` lists options")


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tolserve"


class EngineOptions(Options):
    """A model and how it is run."""

    model: CliPositionalArg[Path] = Field(DEMO_MODEL, description="model directory; the bundled one if not given")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs; auto prefers cuda")
    dtype: DtypeName = Field("auto", description="precision of keys and values, on cuda of activations too")
    weights: WeightsName = Field("auto", description="precision of the weights; auto: --dtype, on a cpu 16 bits stay")
    table: Path | None = Field(None, description="table directory; else MODEL/tol, else built once into --cache-dir")
    device_cache: CacheSize = Field("10%", description="records on the device: a count, bytes (2GiB) or share (10%)")
    host_cache: CacheSize = Field("0", description="records in RAM behind it, same units; processes share a 100%")
    tol_policy: PolicyName = Field("context", description="which record leaves a full cache")
    tol_frequencies: Path | None = Field(None, description="token counts to preload and to pin by (`table freq`)")
    tol_save_frequencies: Path | None = Field(None, description="file to keep counts of the tokens that run in")
    tol_trace: Path | None = Field(None, description="new file for the token ids of all requests, for `table replay`")
    tol_encoding: EncodingName = Field("bf16", description="encoding of the table to open, or to build (not lowrank)")
    tol_io: Literal["direct", "buffered"] = Field("direct", description="read past the page cache or through it")
    tol_read_depth: ReadDepth = Field(32, description="reads at the disk at the same time, at most")
    max_num_seqs: Positive = Field(32, description="sequences in one step at most")
    max_num_batched_tokens: Positive = Field(512, description="tokens in one step at most")
    max_model_len: Positive | None = Field(None, description="tokens of prompt and answer together; the model's limit")
    max_queue: Positive = Field(256, description="waiting sequences at most; further requests get 429")
    cache_dir: Path = Field(default_factory=_default_cache_dir, description="private folder for tables built here")
    kv_cache: Bytes = Field("auto", description="memory for keys and values, bytes with a unit (1GiB)")
    prefix_cache: bool = Field(True, description="keep keys and values of texts that may come again")
    threads: Positive | None = Field(None, description="CPU threads of the engine; every core it may use if not given")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity that is logged")
    log_format: Literal["auto", "json", "text"] = Field("auto", description="auto: text on a terminal, else JSON")

    def engine_json(self) -> dict[str, Any]:
        """The engine's part, as engine.config.EngineSettings reads it."""
        return self.model_dump(mode="json", include=set(EngineOptions.model_fields) - set(Options.model_fields))


class ServeSettings(EngineOptions):
    """Serve a model over the OpenAI HTTP interface."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key: SecretStr | None = Field(
        None, description="key that every route asks for, except /health, /ready and the console's files"
    )
    api_key_file: Path | None = Field(None, description="file that holds the key, so that no process list shows it")
    served_model_name: str | None = Field(None, min_length=1, description="the model's name; its folder's if not given")
    packs: Path | None = Field(None, description="folder of memory packs (`tolserve pack`) that requests may ask for")
    pack_memory: ByteCount = Field("256MiB", description="memory for packs that are loaded, bytes with a unit")
    shutdown_timeout: NotNegativeFloat = Field(25.0, description="seconds that running requests get to finish")

    @model_validator(mode="after")
    def _check_packs(self) -> Self:
        if self.packs is None and "pack_memory" in self.model_fields_set:
            raise ValueError("--pack-memory is for packs; name their folder with --packs, or leave it out")
        return self

    @model_validator(mode="after")
    def _check_key(self) -> Self:
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("give --api-key or --api-key-file, not both")
        self.key()
        return self

    def key(self) -> str | None:
        """The API key, None if none is asked for. Raises ValueError for one that no HTTP header can carry."""
        if self.api_key is not None:
            key, flag = self.api_key.get_secret_value(), "--api-key"
        elif self.api_key_file is not None:
            try:
                key, flag = self.api_key_file.read_text().strip(), "--api-key-file"
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"--api-key-file cannot be read: {error}") from error
        else:
            return None
        if not key or not all("!" <= character <= "~" for character in key):
            raise ValueError(f"{flag} must give visible ASCII characters without spaces, at least one")
        return key

    def engine_json(self) -> dict[str, Any]:
        return super().engine_json() | self.model_dump(mode="json", include={"packs", "pack_memory"})

    @property
    def asks_for_key(self) -> bool:
        return self.api_key is not None or self.api_key_file is not None

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name


class GenerateSettings(EngineOptions):
    """Continue a text in the terminal."""

    prompt: str = Field(description="text to continue")
    max_tokens: Positive = Field(128, description="new tokens at most")
    temperature: float = Field(1.0, ge=0, le=2, description="0 always takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens that make up this probability")
    top_k: int = Field(0, ge=0, description="sample from this many of the likeliest tokens; 0 from all")
    min_p: float = Field(0.0, ge=0, le=1, description="drop tokens less likely than this share of the likeliest")
    seed: int | None = Field(None, ge=0, lt=2**64, description="the same seed gives the same text; random if not given")
    json_output: bool = Field(False, description="print one JSON object at the end instead of the text")


# What --preset takes where it is not given: the paper's recipe for those shapes (section 4). The rest is the same.
_PAPER = {"length": 2048, "warmup": 5000, "peak_lr": 1e-4, "min_lr": 1e-5}


class TrainSettings(Options):
    """Train a model, and its tokenizer if none is given. The defaults are the demo model's recipe; with --preset the
    paper's: --length 2048, --warmup 5000, --peak-lr 1e-4, --min-lr 1e-5."""

    data: list[Path] = Field(
        min_length=1, description="text (.jsonl, .txt, also with .gz, .bz2, .xz) or token ids (.npy), in this order"
    )
    held_out: Path | None = Field(None, description="text that only the final figures see")
    tokenizer: Path | None = Field(None, description="tokenizer.json to use; trained on --data if not given")
    out: Path = Field(description="folder of the run; an unfinished run there is continued")
    preset: Literal["250M", "750M", "1B"] | None = Field(
        None, description="a shape and recipe of the paper, as --ffn-variant"
    )
    init_from: Path | None = Field(None, description="LLaMA checkpoint to take all but the FFNs and the tokenizer from")
    freeze: bool = Field(False, description="with --init-from: train the new networks alone")
    distil: bool = Field(False, description="with --init-from: learn its model's predictions instead of the text")
    vocab_size: Positive = 8192
    hidden_size: Positive = 256
    intermediate_size: Positive = 960
    num_hidden_layers: Positive = 8
    num_attention_heads: Positive = 4
    num_key_value_heads: Positive = 4
    ffn_variant: Literal["base", "memory", "flex"] = "memory"
    flex_beta: int = Field(0, ge=0, le=3, description="square maps of a flex model's FFN-C")
    batch: Positive = Field(4, description="sequences per step")
    accumulate: Positive = Field(1, description="micro-batches that each process cuts its share of a step into")
    length: Positive = Field(1024, description="tokens per sequence")
    steps: Positive = 4200
    warmup: int = Field(200, ge=0, description="steps of linear warm-up")
    peak_lr: PositiveFloat = 3e-3
    min_lr: NotNegativeFloat = 1.5e-4
    weight_decay: NotNegativeFloat = 0.1
    beta1: Share = 0.9
    beta2: Share = 0.95
    z_loss: NotNegativeFloat = 1e-6
    clip: PositiveFloat = Field(1.0, description="largest norm of a step's gradient")
    seed: int = Field(0, ge=0, lt=2**63)
    autocast: Literal["off", "bf16"] = Field("off", description="bf16: matrix products in 16 bits, weights in 32")
    compile: bool = Field(False, description="run the model through torch.compile")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train; auto prefers cuda")
    save_every: Positive = Field(250, description="steps between saves of resumable state")
    threads: Positive | None = Field(None, description="CPU threads; all cores if not given")
    json_output: bool = Field(False, description="print the final figures as JSON")

    @model_validator(mode="before")
    @classmethod
    def _follow_the_paper(cls, given: dict[str, Any]) -> dict[str, Any]:
        return _PAPER | given if given.get("preset") is not None else given

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if self.init_from is not None and self.preset is not None:
            raise ValueError("--preset and --init-from both say the shape; give one of them")
        return self


class InspectSettings(Options):
    """Show a token's record: what each layer's row promotes and suppresses, and whose are alike."""

    model: CliPositionalArg[Path] = Field(description="model directory")
    token: CliPositionalArg[str] = Field(description="id of a token, or the text of one")
    text: bool = Field(False, description="TOKEN is text, also where it is digits")
    layers: str | None = Field(None, pattern=r"^[0-9]+(,[0-9]+)*$", description="layers to show, as 0,3; all")
    top: int = Field(8, ge=1, le=50, description="length of the lists")
    nearest: bool = Field(True, description="read the whole table once and compare with every record")
    table: Path | None = Field(None, description="table directory; else MODEL/tol, else built once into --cache-dir")
    cache_dir: Path = Field(default_factory=_default_cache_dir, description="private folder for tables built here")
    frequencies: Path | None = Field(None, description="token counts (`table freq`) to say how frequent it is")
    json_output: bool = Field(False, description="print it as JSON")


class TableBuildSettings(Options):
    """Run every feed-forward network once over the vocabulary and write the table."""

    model: CliPositionalArg[Path] = Field(description="model directory with its memory.* tensors")
    out: Path | None = Field(None, description="table directory; MODEL/tol if not given")
    encoding: Literal["bf16", "int8", "int4"] = Field("bf16", description="how values are stored")
    group_size: Positive | None = Field(None, description="int8, int4: values per scale; 64, or 32 in lowrank tables")
    rank: Positive | None = Field(None, description="lowrank: values stored per row")
    energy: float | None = Field(None, gt=0, le=1, description="lowrank: share of the squared norm to keep (0.99)")
    drop_layers: str = Field("", pattern=r"^([0-9]+(,[0-9]+)*)?$", description="layers without rows, as 3,5")
    force: bool = Field(False, description="replace a table that is already there")
    json_output: bool = Field(False, description="print what was built as JSON")


class TableVerifySettings(Options):
    """Read a whole table and check every checksum."""

    table: CliPositionalArg[Path] = Field(description="table directory, or model directory with one in tol/")
    json_output: bool = Field(False, description="print the result as JSON")


class TableInspectSettings(Options):
    """Say what a table holds, from its manifest and headers alone."""

    table: CliPositionalArg[Path] = Field(description="table directory, or model directory with one in tol/")
    json_output: bool = Field(False, description="print it as JSON")


class TableExportSettings(Options):
    """Write a serving checkpoint without feed-forward weights, beside its table."""

    model: CliPositionalArg[Path] = Field(description="model directory with its memory.* tensors")
    out: CliPositionalArg[Path] = Field(description="new model directory")
    json_output: bool = Field(False, description="print the result as JSON")


class TableFreqSettings(Options):
    """Count the tokens of texts, for --tol-frequencies."""

    text: CliPositionalArg[list[Path]] = Field(min_length=1, description="text, .jsonl or .txt, may end in .gz")
    tokenizer: Path = Field(description="model directory whose tokenizer.json counts, or such a file")
    out: Path = Field(description="file to write, .npz")
    json_output: bool = Field(False, description="print what was counted as JSON")


class TableReplaySettings(Options):
    """Replay a recorded trace through a replacement policy, beside LRU and the optimum."""

    trace: Path = Field(description="trace to replay, an .npz of tokens, offsets and vocab_size")
    cache: CacheSlots | None = Field(None, description="records or a share (10%); 1, 5, 10 and 20% if not given")
    sequences: int = Field(32, ge=1, le=4096, description="sequences that run side by side")
    policy: PolicyName = Field("context", description="which record leaves a full cache")
    frequencies: Path | None = Field(
        None, description="list for policies that pin; the trace's first half if not given"
    )
    json_output: bool = Field(False, description="print the figures as JSON")


class TablePlanSettings(Options):
    """Say before a start what it costs and brings: bytes, hit rate, reads and stall."""

    model: CliPositionalArg[Path] = Field(DEMO_MODEL, description="model directory; the bundled one if not given")
    trace: Path | None = Field(None, description="trace that the policy is replayed on, as for `table replay`")
    frequencies: Path | None = Field(None, description="token counts (`table freq`) to estimate from and to pin by")
    table: Path | None = Field(None, description="table directory; else MODEL/tol, else in --cache-dir")
    device_cache: CacheSizes = Field((), description="device cache sizes beside the usual ones, as 2GiB,15%")
    host_cache: CacheSize = Field("0", description="records in host memory: a count, bytes (2GiB) or share (10%)")
    sequences: SequenceCounts = Field((1, 32), description="sequences in a step, one or several, as 1,32")
    step_ms: PositiveFloat | None = Field(None, description="a step without stall; a GPU's if not given: 1 to 2 ms")
    policy: PolicyName = Field("context", description="which record leaves a full cache")
    encoding: EncodingName | None = Field(
        None, description="the table's encoding; that of one that is there, else bf16"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="as of `serve`; cuda need not be here")
    dtype: DtypeName = Field("auto", description="as of `serve`; sizes weights, keys and values, as the next four")
    weights: WeightsName = Field("auto", description="precision of the weights, as of `serve`")
    max_num_seqs: Positive = Field(32, description="sequences in one step at most")
    max_model_len: Positive | None = Field(None, description="tokens of prompt and answer together; the model's limit")
    kv_cache: Bytes = Field("auto", description="memory for keys and values, bytes with a unit (1GiB)")
    cache_dir: Path = Field(default_factory=_default_cache_dir, description="private folder for tables built here")
    json_output: bool = Field(False, description="print the plan as JSON")

    @model_validator(mode="after")
    def _check_list(self) -> Self:
        if self.policy in ("static", "half-pinned") and self.trace is None and self.frequencies is None:
            raise ValueError(f"--policy {self.policy} needs --frequencies (`tolserve table freq`) or --trace")
        return self


class PackSettings(Options):
    """Make a memory pack: what some tokens get beside, or instead of, their rows, for `serve --packs`."""

    model_config = SettingsConfigDict(cli_shortcuts={"json-output": "json", "from-table": "from"})

    model: CliPositionalArg[Path] = Field(DEMO_MODEL, description="model directory; the bundled one if not given")
    out: Path = Field(description="file to write, NAME.safetensors; requests ask for NAME")
    tokens: TokenWords = Field((), description="token ids, or texts of one token each, as ' king, queen,17'")
    layers: LayerNumbers | None = Field(None, description="layers whose rows change, as 3,5; all if not given")
    from_table: Path | None = Field(None, description="table or model whose rows the tokens get instead of their own")
    suppress: bool = Field(False, description="the tokens get no rows at all")
    scale: Factor | None = Field(None, description="the tokens' rows are multiplied by this")
    layer: int | None = Field(None, ge=0, description="with --cell: the layer that it belongs to")
    cell: int | None = Field(None, ge=0, description="memory cell that counts --times as much, or has another value")
    times: Factor | None = Field(None, description="with --cell: how much its value counts; 1 if not given")
    value_of: str | None = Field(None, description="with --cell: token whose embedding becomes the cell's value")
    share: float = Field(
        0.5, gt=0, le=1, description="with --cell, without --tokens: for tokens from this share of its largest size on"
    )
    description: str | None = Field(None, min_length=1, description="a sentence for who looks at the packs of a server")
    json_output: bool = Field(False, description="print what the pack holds as JSON")

    @model_validator(mode="after")
    def _check_way(self) -> Self:
        ways = {"--from": self.from_table is not None, "--suppress": self.suppress, "--scale": self.scale is not None}
        ways |= {"--cell": self.cell is not None}
        if sum(ways.values()) != 1:
            raise ValueError(f"give exactly one of {', '.join(ways)}")
        if not ways["--cell"]:
            if given := self.model_fields_set & {"layer", "times", "value_of", "share"}:
                raise ValueError(f"{self.flag(min(given))} is for --cell")
            if not self.tokens:
                raise ValueError("--tokens is required; only --cell finds tokens by itself")
        elif self.layer is None or self.layers is not None:
            raise ValueError("--cell belongs to one layer: give --layer, and no --layers")
        elif self.times is None and self.value_of is None:
            raise ValueError("--cell needs --times, --value-of or both")
        elif self.tokens and "share" in self.model_fields_set:
            raise ValueError("--share chooses tokens; leave it out where --tokens names them")
        return self
