"""What does a compiled XLA program move through memory, and which operation of the model asked for it?

    program = Program(text)                  # HLO after optimization, as XLA prints it
    for move in sorted(program.moves(), key=lambda move: -move.bytes)[:5]:
        print(move.bytes, move.operation, move.what)

The model of bytes, which is ours and not the compiler's: an instruction of the schedule reads its operands and writes
its result, as they are stored (tiles and their padding included), if they lie in the device's main memory; what the
compiler keeps in on-chip memory costs nothing. A gather reads the rows that it returns, a scatter in place reads and
writes the rows that it changes, with the padding that they have in their table. A loop costs its body times its trip
count, a conditional its dearest branch. A collective sends what the best algorithm does over a ring. XLA's own count
("bytes accessed") takes a fused gather for a read of the whole table, and a small table's copy for free.

Bytes are not all: a loop's trips follow one another, however little each moves (`Program.loops`).

Needs: nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

SIZES = {"pred": 1, "bool": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
LEAF = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
LINE = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
# No byte moves: names for what is there already, or the end of what was counted at its start.
FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "copy-done", "slice-done", "after-all"}
FREE |= {"async-start", "async-update", "partition-id", "replica-id", "optimization-barrier", "domain"}
FREE |= {"all-reduce-done", "all-gather-done", "collective-permute-done", "send", "recv", "send-done", "recv-done"}
FREE_CALLS = r'target="(\w*Bitcast|Assume\w+|Sharding|AllocateBuffer)"'
WRITES = {"scatter": 2, "dynamic-update-slice": 1}  # a scatter may add, so that it reads first
COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?$")


@dataclass(frozen=True)
class Shape:
    """An array of a program, and how it is stored."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""  # "0,1:T(8,128)S(1)": dimensions from the fastest on, tiles, memory space

    @property
    def plain(self) -> int:
        """Bytes of its numbers alone."""
        return math.prod(self.dims) * _size(self.dtype)

    @property
    def stored(self) -> int:
        """Bytes with the padding to whole tiles."""
        order, _, rest = self.layout.partition(":")
        minor = [int(number) for number in order.split(",") if number]
        dims = [self.dims[axis] for axis in reversed(minor)] if len(minor) == len(self.dims) else list(self.dims)
        tile = re.search(r"T\(([\d,]+)\)", rest)
        dims = dims or [1] * (tile is not None)  # a scalar has a tile too
        for back, length in enumerate(reversed([int(n) for n in tile[1].split(",")] if tile else []), 1):
            if back <= len(dims):
                dims[-back] = math.ceil(dims[-back] / length) * length
        return math.prod(dims) * _size(self.dtype)

    @property
    def main(self) -> int:
        """Bytes to read it, in the main memory of the device; 0 if it is elsewhere. Of a scalar not the whole tile."""
        space = re.search(r"S\((\d+)\)", self.layout)
        return 0 if space and space[1] != "0" else self.stored if self.dims else self.plain

    def __str__(self):
        return f"{self.dtype}[{','.join(f'{length:,}' for length in self.dims)}]"


@dataclass(frozen=True)
class Move:
    """What an instruction moves through main memory."""

    bytes: float  # read and written
    operation: str  # of the model: the name that it has in TensorFlow's graph; "" if none asked for it
    what: str  # "copy of f32[1,000,000,16] into another layout, 512 MB as stored for 64 MB of numbers"
    between_chips: bool = False


@dataclass
class Instruction:
    """A line of a computation."""

    name: str
    shapes: list[Shape]
    opcode: str
    operands: list[str]
    line: str
    root: bool

    def attribute(self, key: str) -> str | None:
        """The name of the computation that it calls as `key`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.line)
        return found[1] if found else None


@dataclass
class Program:
    """The text of an optimized HLO module."""

    text: str
    entry: str = ""
    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)

    def __post_init__(self):
        current = None
        for line in self.text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := LINE.match(line)):
                inside = found[5][: _closing(found[5])]
                operands = re.findall(r"%([\w.\-]+)", inside) or re.findall(r"(?:^|, )([\w.\-]+)(?=,|$)", inside)
                current[found[2]] = Instruction(
                    found[2], _shapes(found[3]), found[4], operands, line, found[1] is not None
                )
        if not self.entry:
            raise ValueError(f"no ENTRY in this text: expected optimized HLO, found {self.text[:80]!r}")

    def parameters(self) -> list[Shape]:
        """What the program takes, in order."""
        found = [one for one in self.computations[self.entry].values() if one.opcode == "parameter"]
        found.sort(key=_number)
        return [one.shapes[0] for one in found]

    def aliases(self) -> dict[int, int]:
        """Of each variable the output that is its new value, and the parameter that was the old one."""
        return {int(o or 0): int(p) for o, p in re.findall(r"\{(\d*)\}: \((\d+), \{\}, \w+-alias\)", self.text)}

    def loops(self, computation: str | None = None, times: int = 1) -> list[tuple[int, str]]:
        """(trips in all, operation of the model) of each loop: what a chip does one after the other."""
        found = []
        for one in self.computations[computation or self.entry].values():
            if one.opcode == "while":
                trips = times * self._trips(one)
                found += [(trips, _operation(one)), *self.loops(one.attribute("body"), trips)]
        return found

    def counted_once(self) -> list[str]:
        """Operations of the model that are loops with products in them, of which XLA counts the FLOPs of one trip."""

        def multiplies(name: str | None) -> bool:
            inside = self.computations.get(name or "", {}).values()
            called = (one.attribute(key) for one in inside for key in ("calls", "to_apply", "body"))
            return any(one.opcode in ("dot", "convolution") for one in inside) or any(map(multiplies, called))

        every = [one for computation in self.computations.values() for one in computation.values()]
        return [_operation(one) for one in every if one.opcode == "while" and multiplies(one.attribute("body"))]

    def _trips(self, one: Instruction) -> int:
        """As the compiler says; else the constant that the loop's condition compares with; else 1."""
        if said := re.search(r'known_trip_count":\{"n":"(\d+)"', one.line):
            return int(said[1])
        condition = self.computations.get(one.attribute("condition") or "", {})
        ends = [re.search(r" constant\((\d+)\)", each.line) for each in condition.values() if each.opcode == "constant"]
        below = any(each.root and "direction=LT" in each.line for each in condition.values())
        return int(ends[0][1]) if below and len(ends) == 1 and ends[0] else 1

    def moves(self, computation: str | None = None, times: float = 1) -> list[Move]:
        """Each instruction of the schedule that moves bytes."""
        found, there = [], self.computations[computation or self.entry]
        for one in there.values():
            if one.opcode == "while":
                found += self.moves(one.attribute("body"), times * self._trips(one))
            elif one.opcode == "call":
                found += self.moves(one.attribute("to_apply"), times)
            elif one.opcode == "conditional":
                names = re.findall(r"%([\w.\-]+)", (re.search(r"branch_computations=\{(.*?)\}", one.line) or [""])[0])
                names += [one.attribute(key) for key in ("true_computation", "false_computation")]
                branches = [self.moves(name, times) for name in names if name]
                found += max(branches, key=lambda moves: sum(move.bytes for move in moves), default=[])
            elif one.opcode not in FREE:
                count, what = self._bytes(one, there)
                if count:
                    sent = re.match(r"all-|reduce-scatter|collective-permute", what) is not None
                    found.append(Move(count * times, _operation(one), what, sent))
        return found

    def _bytes(self, one: Instruction, there: dict[str, Instruction]) -> tuple[float, str]:
        if one.opcode == "async-done":
            one = self._asynchronous(one, there)
        if not one.shapes:
            return 0, ""
        result, operands = one.shapes[0], [there[name] for name in one.operands if name in there]
        operands = [shape for each in operands for shape in each.shapes]
        if collective := COLLECTIVE.match(one.opcode):
            return self._sent(collective[1], one, operands)
        if one.opcode in ("copy-start", "slice-start"):
            to, source = (one.shapes[0], one.shapes[1]) if one.opcode == "copy-start" else one.shapes[1::-1]
            if source.main and to.main:
                return _part(to, source) + to.main, _copied([source], to)
            return _part(to, source) + to.main, f"{source} {'to' if source.main else 'from'} on-chip memory"
        if one.opcode == "custom-call" and re.search(FREE_CALLS, one.line):
            return 0, ""
        inside = self.computations.get(one.attribute("calls") or "", {})
        if one.opcode == "fusion" and inside:
            return self._fusion(one, inside, there)
        if one.opcode in ("gather", "dynamic-slice", "slice"):
            rest = sum(shape.main for shape in operands[1:])  # indices
            return _part(result, operands[0]) + rest + result.main, f"{one.opcode} of {result} out of {operands[0]}"
        if one.opcode in ("scatter", "dynamic-update-slice"):
            update = operands[2 if one.opcode == "scatter" else 1]
            rest = sum(shape.main for shape in operands[1:])
            return WRITES[one.opcode] * _part(update, result) + rest, f"{one.opcode} of {update} into {result}"
        count = sum(shape.main for shape in [*operands, *one.shapes])
        if one.opcode == "copy":
            return count, _copied(operands, result)
        return count, f"{one.opcode}: {', '.join(map(str, operands[:3]))} to {result}"

    def _asynchronous(self, one: Instruction, there: dict[str, Instruction]) -> Instruction:
        """What began earlier and is waited for here, as an instruction of this computation."""
        begun = there[one.operands[0]]
        update = begun.opcode == "async-update"  # then it has the operands, after the name of the start
        start = there[begun.operands[0]] if update else begun
        inside = self.computations.get(start.attribute("calls") or "", {})
        root = next((each for each in inside.values() if each.root), start)
        opcode = root.opcode
        if opcode in ("custom-call", "async-start"):  # of a SparseCore: only the name says what it is
            opcode = next((each for each in ("gather", "scatter") if each in one.name), "copy")
        return replace(root, name=one.name, opcode=opcode, shapes=one.shapes, operands=begun.operands[update:])

    def _sent(self, collective: str, one: Instruction, operands: list[Shape]) -> tuple[float, str]:
        """What a chip sends at least, wherever it lies in memory: around a ring all but its own share."""
        groups = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\] \{(.*?)\})", one.line)
        every = re.search(r"num_partitions=(\d+)", self.text)
        chips = int(every[1]) if every else 2
        if groups and groups[4]:
            axes = dict(re.findall(r"'(\w+)'=(\d+)", groups[3]))
            chips = math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", groups[4]))
        elif groups:
            chips = int(groups[1] or groups[2].count(",") + 1)
        share = {"all-reduce": 2 * (chips - 1) / chips, "collective-permute": 1.0}.get(collective, (chips - 1) / chips)
        # A start returns its operands too, but for all-reduce; the larger side is the whole.
        own = len(operands) if one.opcode.endswith("-start") and collective != "all-reduce" else 0
        sides = [operands, [shape for shape in one.shapes[own:] if shape.dims or not own]]
        whole = max(sides, key=lambda side: sum(shape.stored for shape in side))
        return share * sum(shape.stored for shape in whole), f"{collective} of {', '.join(map(str, whole[:3]))}"

    def _fusion(self, one: Instruction, inside: dict, there: dict) -> tuple[float, str]:
        count, in_place, what = 0.0, [], ""
        for parameter in (each for each in inside.values() if each.opcode == "parameter"):
            number = _number(parameter)
            source = there.get(one.operands[number]) if number < len(one.operands) else None
            if source is None or not source.shapes[0].main:
                continue
            whole, parts = parameter.shapes[0], 0.0
            for reader, first, among in self._readers(parameter.name, inside):
                if first and reader.opcode in ("gather", "dynamic-slice", "slice"):
                    parts += _part(reader.shapes[0], whole)
                    what = what or f"{reader.opcode} of {reader.shapes[0]} out of {whole}"
                elif first and reader.opcode in ("scatter", "dynamic-update-slice"):
                    update = among[reader.operands[2 if reader.opcode == "scatter" else 1]].shapes[0]
                    parts += WRITES[reader.opcode] * _part(update, whole)
                    in_place.append(whole)
                    what = f"{reader.opcode} of {update} into {whole}"
                else:
                    parts = math.inf
            count += parts if whole in in_place and parts < math.inf else min(parts, whole.stored)
        for shape in one.shapes:
            same = [other for other in in_place if (other.plain, other.dtype) == (shape.plain, shape.dtype)]
            if same:
                in_place.remove(same[0])
            else:
                count += shape.main
        sources = [str(there[name].shapes[0]) for name in one.operands if name in there]
        return count, what or f"{one.name.split('.')[0]}: {', '.join(sources[:3])} to {one.shapes[0]}"

    def _readers(self, name: str, inside: dict[str, Instruction]) -> Iterator[tuple[Instruction, bool, dict]]:
        """Who reads a value, past renamings and into fusions: (reader, as its first operand, its computation)."""
        for user in inside.values():
            if name not in user.operands:
                continue
            nested = self.computations.get(user.attribute("calls") or "", {}) if user.opcode == "fusion" else {}
            if user.opcode == "bitcast":
                yield from self._readers(user.name, inside)
            elif nested:
                numbers = {number for number, operand in enumerate(user.operands) if operand == name}
                for each in nested.values():
                    if each.opcode == "parameter" and _number(each) in numbers:
                        yield from self._readers(each.name, nested)
            else:
                yield user, user.operands[0] == name, inside


def _operation(one: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', one.line)
    return found[1] if found and found[1] != "XLA_Args" else ""


def _number(parameter: Instruction) -> int:
    return int(re.search(r" parameter\((\d+)\)", parameter.line)[1])


def _part(rows: Shape, whole: Shape) -> float:
    """Bytes of some rows of an array in main memory, padded as that is and in its dtype: a fusion may convert them."""
    return rows.plain / _size(rows.dtype) * _size(whole.dtype) * whole.main / max(whole.plain, 1)


def compact(dims: tuple[int, ...], dtype: str) -> int:
    """Bytes that a TPU keeps an argument of a program in: of all orders of its dimensions that with least padding.

    Tiles are 8 sublanes by 128 lanes of 32 bits, four times as many sublanes of 8 bits; fewer than 8 rows have a tile
    of 1, 2 or 4. So [1,000,000, 16] lies there as 16 rows of a million without padding, not as rows of 16 in 128 lanes.

    Args:
      dtype: as TensorFlow or XLA calls it, float32 or f32.
    """
    size = int(_size(re.sub(r"^(bf|f|u|s|c|int|float|uint|bfloat|complex)[a-z]*(?=\d)", _short, dtype)))
    if len(dims) < 2:
        length = math.prod(dims)  # in a tile of 512 bytes or more; a scalar has one too
        tile = min(1024, max(512 // min(size, 4), 1 << max(0, length - 1).bit_length()))
        return math.ceil(length / tile) * tile * size
    best = math.inf
    for sublane, rows in enumerate(dims):
        for lane, columns in enumerate(dims):
            if lane != sublane:
                tile = 32 if size == 1 else min(8, 1 << max(0, rows - 1).bit_length())
                others = math.prod(dims) // max(rows * columns, 1)
                best = min(best, math.ceil(rows / tile) * tile * math.ceil(columns / 128) * 128 * others * size)
    return best


def _short(found: re.Match) -> str:
    return {"bfloat": "bf", "float": "f", "int": "s", "uint": "u", "complex": "c"}.get(found[0], found[0])


def _size(dtype: str) -> float:
    bits = re.fullmatch(r"[suf](\d+).*", dtype)
    return SIZES.get(dtype) if dtype in SIZES else int(bits[1]) / 8 if bits else 1


def _shapes(text: str) -> list[Shape]:
    return [
        Shape(dtype, tuple(int(number.lstrip("<=")) for number in dims.split(",") if number), layout)
        for dtype, dims, layout in LEAF.findall(text)
    ]


def _closing(text: str) -> int:
    """Where the parenthesis that was opened before the text closes."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    return len(text)


def _copied(operands: list[Shape], result: Shape) -> str:
    wide = max([*operands, result], key=lambda shape: shape.stored)
    padded = f", {wide.stored / 1e6:,.0f} MB as stored for {wide.plain / 1e6:,.0f} MB of numbers"
    other = any(shape.layout.partition(":")[0] != result.layout.partition(":")[0] for shape in operands)
    return f"copy of {result}{' into another layout' if other else ''}{padded if wide.stored > wide.plain else ''}"
