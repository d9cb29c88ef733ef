"""How a row becomes bytes: the value types, the scales, and where in a record a layer's row lies.

A row is `width` values, then its scales:

- `bf16`: 2 bytes a value, little-endian, no scales.
- `int8`: 1 byte a value, two's complement, -127 to 127.
- `int4`: half a byte a value, two's complement, -8 to 7; value 2i is the low half of byte i, value 2i + 1 the high one.

`int8` and `int4` have one bf16 scale per `group_size` consecutive values. A value is float32(integer) * float32(scale),
rounded to the precision of whoever reads it.

A `lowrank` table holds, instead of a layer's row [hidden_size], its coordinates [rank] in the layer's factor [rank,
hidden_size], which lies beside the records. The coordinates are encoded as above.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

Values = Literal["bf16", "int8", "int4"]
BITS: dict[Values, int] = {"bf16": 16, "int8": 8, "int4": 4}
SCALE_BYTES = 2  # bf16
LOWRANK = "lowrank"
# A group's scale costs 2 bytes. 64 divides the widths of all the paper's models. On the demo model int8 rows cost
# 0.001% in bits per byte with groups of 32 to 256, and int4 rows 0.12, 0.20 and 0.32% with groups of 32, 64 and 128. At
# 24 layers of 2048, int4 records with groups of 64 leave 9% of 7 pages empty; of 128, 12%, too much to pad.
GROUP_SIZE = 64
# The coordinates of lowrank rows shrink from the first to the last, so that neighbours alone share a scale well.
LOWRANK_GROUP_SIZE = 32
# Every row is then a multiple of four bytes, also in int4, and so no value or scale lies across its own alignment.
GROUP_STEP = 8


class EncodingError(ValueError):
    """An encoding that does not exist or does not fit a model's shape; the message says what would."""


@dataclass(frozen=True)
class RowLayout:
    """Where one layer's row lies in its part of a record, and how it is encoded: what a gather needs to know."""

    offset: int  # bytes from the start of the part
    width: int  # values
    values: Values
    group_size: int | None  # values per scale; None for bf16


@dataclass(frozen=True)
class Encoding:
    """How a table's rows are written. `group_size` is the number of values per scale, None for bf16; `ranks` those of
    a lowrank table's layers, in record order. Raises EncodingError for a group size that cannot be."""

    values: Values = "bf16"
    group_size: int | None = None
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.values not in BITS:
            raise EncodingError(f"values are {self.values!r}; known: {', '.join(BITS)}")
        if (self.group_size is None) != (self.values == "bf16"):
            raise EncodingError(f"{self.values} with group size {self.group_size}: int8 and int4 have one, bf16 none")
        if self.group_size is not None and (self.group_size < GROUP_STEP or self.group_size % GROUP_STEP):
            raise EncodingError(f"group size {self.group_size}: it must be a multiple of {GROUP_STEP}")

    @property
    def name(self) -> str:
        """What `--tol-encoding` calls it: bf16, int8, int4, lowrank, lowrank-int8 or lowrank-int4."""
        if self.ranks is None:
            return self.values
        return LOWRANK if self.values == "bf16" else f"{LOWRANK}-{self.values}"

    def widths(self, layers: int, hidden_size: int) -> tuple[int, ...]:
        """Values of each layer's row. Raises EncodingError when the encoding cannot hold such layers."""
        if self.ranks is not None and (
            len(self.ranks) != layers or not all(0 < rank <= hidden_size for rank in self.ranks)
        ):
            raise EncodingError(f"ranks {self.ranks} are not {layers} numbers from 1 to {hidden_size}")
        widths = (hidden_size,) * layers if self.ranks is None else self.ranks
        group = self.group_size or 1
        if uneven := [width for width in widths if width % group]:
            raise EncodingError(
                f"a row of {uneven[0]} values is no multiple of the group size {group}; give `tolserve table build` a "
                "--group-size that divides it"
            )
        return widths

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` values with its scales."""
        scales = width // self.group_size if self.group_size is not None else 0
        return width * BITS[self.values] // 8 + scales * SCALE_BYTES

    def to_json(self) -> dict[str, Any]:
        fields = {"name": self.name}
        optional = {"group_size": self.group_size, "ranks": self.ranks and list(self.ranks)}
        return fields | {name: value for name, value in optional.items() if value is not None}

    @classmethod
    def parse(cls, raw: Any) -> "Encoding":
        """The reverse of `to_json`, for JSON from anywhere. Raises EncodingError."""
        if not isinstance(raw, dict):
            raise EncodingError(f"encoding is {raw!r}, not an object")
        values, lowrank = values_of(raw.get("name"))
        expected = {"name"} | ({"group_size"} if values != "bf16" else set()) | ({"ranks"} if lowrank else set())
        if raw.keys() != expected:
            raise EncodingError(f"encoding {raw['name']} has {sorted(raw)}; it must have {sorted(expected)}")
        ranks = raw.get("ranks")
        if lowrank and not (isinstance(ranks, list) and all(type(rank) is int for rank in ranks)):
            raise EncodingError(f"ranks is {ranks!r}; it must be a list of whole numbers")
        group_size = raw.get("group_size")
        if values != "bf16" and type(group_size) is not int:
            raise EncodingError(f"group_size is {group_size!r}; it must be a whole number")
        return cls(values, group_size, tuple(ranks) if ranks is not None else None)


BF16 = Encoding()


def values_of(name: Any) -> tuple[Values, bool]:
    """Value type of an encoding's name, and whether it is lowrank. Raises EncodingError for no known name."""
    lowrank = name == LOWRANK or (isinstance(name, str) and name.startswith(f"{LOWRANK}-int"))
    values = "bf16" if name == LOWRANK else name.removeprefix(f"{LOWRANK}-") if lowrank else name
    if values not in get_args(Values):
        raise EncodingError(f"encoding is {name!r}; this tolserve reads bf16, int8, int4 and lowrank[-int8|-int4]")
    return cast(Values, values), lowrank
