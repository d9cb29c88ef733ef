"""The options of every study: `tolserve study NAME`. How they are read is settings.py's."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import CliPositionalArg, NoDecode

from tolserve.settings import CacheSize, NotNegativeFloat, Options, Positive, PositiveFloat, TokenWords, split

Numbers = Annotated[
    tuple[Annotated[float, Field(allow_inf_nan=False)], ...], NoDecode, BeforeValidator(split), Field(min_length=1)
]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split), Field(min_length=1)]
Cells = Annotated[tuple[Annotated[int, Field(ge=0)], ...], NoDecode, BeforeValidator(split)]
PruneMethods = Annotated[
    tuple[Literal["magnitude", "wanda", "sparsegpt"], ...], NoDecode, BeforeValidator(split), Field(min_length=1)
]


class StudyParamsSettings(Options):
    """Active and total parameters of the paper's fifteen configurations."""

    json_output: bool = Field(False, description="print them as JSON")


class StudyOptions(Options):
    """What all studies share that write files."""

    out: Path = Field(description="folder for NAME.json, NAME.md and NAME.png")
    threads: Positive | None = Field(None, description="CPU threads; all cores if not given")
    json_output: bool = Field(False, description="print the whole study as JSON")


class TaskOptions(StudyOptions):
    """Trained models, and what a study measures on them."""

    model: CliPositionalArg[list[Path]] = Field(min_length=1, description="model directories, one or several")
    text: list[Path] = Field([], description="text to measure perplexity on, .jsonl or .txt, may end in .gz; several")
    tokens: Positive | None = Field(None, description="tokens of each text, about; all if not given")
    length: Positive | None = Field(
        None, description="tokens of a window; 1,024, or the models' smallest context, if not given"
    )
    blimp: Path | None = Field(None, description="BLiMP's zip, to measure its accuracies as well")
    pairs: Positive = Field(200, description="pairs of each of BLiMP's paradigms; it has 1,000")

    # What nothing but --text has a use for.
    _of_text: ClassVar[frozenset[str]] = frozenset({"tokens", "length"})

    @model_validator(mode="after")
    def _check_uses(self) -> Self:
        if not self.text and (given := self.model_fields_set & self._of_text):
            raise ValueError(f"{self.flag(min(given))} is for --text")
        _check_pairs(self, self.blimp)
        return self


def _check_pairs(settings: Options, blimp: Path | None) -> None:
    if blimp is None and "pairs" in settings.model_fields_set:
        raise ValueError("--pairs is for --blimp")


class StudyAlphaSettings(TaskOptions):
    """Feed-forward outputs scaled from 1 to 0: perplexity and BLiMP (Fig. 7, Table 1). Runs on the CPU."""

    alphas: Numbers = Field((1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25, 0.0), description="scales, as 1,0.5,0")


class StudyDropLayerSettings(TaskOptions):
    """One layer's feed-forward output left out, every layer in turn (Fig. 4, 12). Runs on the CPU."""


class StudyQuantizeSettings(TaskOptions):
    """Tables of 16, 8 and 4 bits: bytes, perplexity and BLiMP (Table 7). Runs on the CPU."""

    group_size: Positive = Field(64, description="values per scale of int8 and int4")


class StudyLowrankSettings(TaskOptions):
    """Singular spectra of the rows, and rows of lower rank (Table 8, Fig. 13). Runs on the CPU."""

    cuts: Numbers = Field((0.1, 0.2, 0.3, 0.4, 0.5), description="shares of the rank cut off in all layers, as 0.1,0.5")
    energies: Numbers = Field(
        (0.999, 0.99, 0.97, 0.95, 0.9, 0.8), description="shares of the squared norm kept in each layer, as 0.99,0.9"
    )


class StudyPruneSettings(TaskOptions):
    """The first model, a base one, pruned to the active parameters of each other one (Fig. 11). Runs on the CPU."""

    calibration: Path = Field(description="text that wanda and sparsegpt see, best of what the model was trained on")
    sequences: Positive = Field(32, description="windows of --calibration, each from a document of its own")
    methods: PruneMethods = Field(("magnitude", "wanda", "sparsegpt"), description="as magnitude,wanda,sparsegpt")

    _of_text: ClassVar[frozenset[str]] = frozenset({"tokens"})  # --calibration is cut by --length as well


class StudyTkvSettings(StudyOptions):
    """Memory networks read as tokens, keys and values: clusters, outliers, neighbours, cells (Fig. 5, 6).

    Runs on the CPU."""

    model: CliPositionalArg[Path] = Field(description="model directory, memory or flex, with its memory.* tensors")
    layer: int = Field(0, ge=0, description="layer whose clusters, neighbours and cells are shown")
    clusters: int = Field(32, ge=2, description="clusters of each layer")
    token: TokenWords = Field((), description="tokens whose neighbours to show, as ' king, queen'")
    cells: Cells = Field((), description="cells to read, as 3,17; the strongest ones if not given")
    sample: int = Field(4096, ge=2, description="tokens that stand for the vocabulary in clusters and figures")
    projection: Literal["tsne", "pca"] = Field("tsne", description="of the picture; pca is quicker")
    seed: int = Field(0, ge=0, lt=2**32, description="of sample, clusters and projection")


class StudyCompareSettings(StudyOptions):
    """Base, flex and memory trained with one recipe, and a base of as many active parameters (Table 2, Fig. 9, 10)."""

    data: list[Path] = Field(min_length=1, description="training text as of `train`, in this order")
    held_out: Path = Field(description="text that no run trains on")
    tokenizer: Path | None = Field(None, description="tokenizer.json to use; trained on --data if not given")
    variants: Words = Field(
        ("base:3", "memory:3", "flex-3", "flex-2", "flex-1", "base-small"),
        description="which, and how many seeds of each, as base:3,flex-1",
    )
    vocab_size: Positive = 4096
    hidden_size: Positive = Field(128, description="of all but base-small, whose width follows")
    num_hidden_layers: Positive = 8
    num_attention_heads: Positive = 4
    batch: Positive = Field(16, description="sequences per step")
    accumulate: Positive = Field(1, description="micro-batches that each process cuts its share of a step into")
    length: Positive = Field(512, description="tokens per sequence")
    steps: Positive = 1280
    warmup: int = Field(100, ge=0, description="steps of linear warm-up")
    peak_lr: PositiveFloat = 3e-3
    min_lr: NotNegativeFloat = 1.5e-4
    autocast: Literal["off", "bf16"] = Field("off", description="bf16: matrix products in 16 bits, weights in 32")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train; auto prefers cuda")
    save_every: Positive = Field(40, description="steps between saves of resumable state")
    text: list[Path] = Field([], description="text to measure perplexity on beside --held-out, on the CPU; several")
    blimp: Path | None = Field(None, description="BLiMP's zip, to measure its accuracies as well, on the CPU")
    pairs: Positive = Field(200, description="pairs of each of BLiMP's paradigms; it has 1,000")

    @model_validator(mode="after")
    def _check_uses(self) -> Self:
        _check_pairs(self, self.blimp)
        return self


class StudyDecodeCostSettings(StudyOptions):
    """Memory and ms a token of the five variants, predicted and measured (Table 6)."""

    preset: Literal["250M", "750M", "1B"] | None = Field(None, description="a size of the paper's, for the next three")
    hidden_size: Positive = 1024
    num_hidden_layers: Positive = 8
    num_attention_heads: Positive = 16
    vocab_size: Positive | None = Field(None, description="8,192, of a preset 128,256, if not given")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the variants run; auto prefers cuda")
    device_cache: CacheSize = Field("10%", description="records on the device: a count, bytes (2GiB) or share (10%)")
    context: Positive = Field(64, description="tokens of the prompt")
    steps: Positive = Field(16, description="timed tokens of a variant in a round")
    rounds: Positive = Field(7, description="turns of each variant")
    seed: int = Field(0, ge=0, lt=2**32, description="of the tokens that are run")

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        sizes = {"hidden_size", "num_hidden_layers", "num_attention_heads"}
        if self.preset is not None and (given := self.model_fields_set & sizes):
            raise ValueError(f"{self.flag(min(given))}: --preset {self.preset} has one of its own")
        return self
