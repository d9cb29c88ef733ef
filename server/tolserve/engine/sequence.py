"""A sequence's state between steps."""

from array import array
from dataclasses import dataclass, field

from tolserve.engine.request import Request, TokenLogprob
from tolserve.engine.steering import Steered


@dataclass(eq=False)  # identity: two sequences with equal fields are still two
class Sequence:
    """One request in the engine. `computed` tokens have their keys and values in `blocks`; the rest, up to
    `len(tokens)`, must still pass through the layers. A decoding sequence has exactly one such token."""

    request: Request
    arrived: float  # engine clock, seconds
    steering: Steered | None = None  # what it holds of request.steering
    request_id: str = field(init=False)
    tokens: list[int] = field(init=False)
    prompt_length: int = field(init=False)
    computed: int = 0
    told: int = 0  # tokens that the policies have been told of; more than `computed` when it runs some again
    begins: int = 0  # tokens that it need not run, as far as that was seen while it waited
    read_ahead: int = 0  # tokens that need not run, or whose records are there or on their way, as far as was seen
    passed: int = 0  # admissions of later ones before it
    blocks: "array[int]" = field(default_factory=lambda: array("i"))  # block table, in token order: int32 for kernels
    root_key: bytes = b""  # prefix.py's, before the first block; with the table that the sequence began with
    block_keys: list[bytes] = field(default_factory=list)  # of its first full blocks, as far as they were asked for
    cached: int | None = None  # tokens whose keys and values were there when it was first admitted
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    started: float | None = None  # first scheduled
    first_token: float | None = None
    last_token: float | None = None
    lookups: int = 0
    hits: int = 0
    token_hits: list[bool | None] = field(default_factory=list)  # if asked for; None: had its keys and values already
    hits_reported: int = 0  # of these
    stall: float = 0.0  # seconds
    sat_out: bool = False  # the last step, see sitout.SitOut

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id
        self.tokens = list(self.request.prompt)
        self.prompt_length = len(self.tokens)
        if self.request.sampling.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)

    def start_over(self) -> None:
        """Forget what was computed, and all that was seen of what it may begin with."""
        self.computed = self.begins = self.read_ahead = 0
        self.root_key = b""
        self.block_keys.clear()

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens that have not passed through the layers yet."""
        return len(self.tokens) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether its next token is one that was chosen for it. The last token of a prompt is still of the prompt."""
        return self.pending == 1 and self.generated > 0


@dataclass(slots=True)
class Chunk:
    """The tokens [start, end) of a sequence, to run in one step."""

    sequence: Sequence
    start: int
    count: int
    end: int = field(init=False)
    tokens: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.end = self.start + self.count
        self.tokens = self.sequence.tokens[self.start : self.end]

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that its logits choose the next one."""
        return self.end == len(self.sequence.tokens)
