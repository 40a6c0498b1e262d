"""What does a compiled XLA program move through memory, and which operation of the model asked for it?

    program = Program(text)                  # HLO after optimization, as XLA prints it
    for move in sorted(program.moves(), key=lambda move: -move.bytes)[:5]:
        print(move.bytes, move.operation, move.what)

The model of bytes, which is ours and not the compiler's: an instruction of the schedule reads its operands and writes
its result, as they are stored (tiles and their padding included), if they lie in the device's main memory; what the
compiler keeps in on-chip memory costs nothing. A gather reads the rows that it returns, a scatter in place reads and
writes the rows that it changes. A loop costs its body times its trip count, a conditional its dearest branch. XLA's own
count ("bytes accessed") takes a fused gather for a read of the whole table, and a small table's copy for free.

Needs: nothing else.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

SIZES = {"pred": 1, "bool": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
LEAF = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
LINE = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
# No byte moves: names for what is there already, or the end of what was counted at its start.
FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "copy-done", "slice-done", "after-all"}
FREE |= {"async-start", "async-update", "partition-id", "replica-id", "iota", "optimization-barrier", "domain"}
FREE |= {"all-reduce-done", "all-gather-done", "collective-permute-done", "send", "recv", "send-done", "recv-done"}
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
        for back, length in enumerate(reversed([int(n) for n in tile[1].split(",")] if tile else []), 1):
            if back <= len(dims):
                dims[-back] = math.ceil(dims[-back] / length) * length
        return math.prod(dims) * _size(self.dtype)

    @property
    def main(self) -> int:
        """Bytes as stored, if that is in the main memory of the device; else 0."""
        space = re.search(r"S\((\d+)\)", self.layout)
        return 0 if space and space[1] != "0" else self.stored

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
        found.sort(key=lambda one: int(re.search(r" parameter\((\d+)\)", one.line)[1]))
        return [one.shapes[0] for one in found]

    def aliases(self) -> dict[int, int]:
        """Of each variable the output that is its new value, and the parameter that was the old one."""
        return {int(o or 0): int(p) for o, p in re.findall(r"\{(\d*)\}: \((\d+), \{\}, \w+-alias\)", self.text)}

    def moves(self, computation: str | None = None, times: float = 1) -> list[Move]:
        """Each instruction of the schedule that moves bytes."""
        found, there = [], self.computations[computation or self.entry]
        for one in there.values():
            if one.opcode == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', one.line)
                found += self.moves(one.attribute("body"), times * int(trips[1] if trips else 1))
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
                    operation = re.search(r'op_name="([^"]*)"', one.line)
                    found.append(
                        Move(
                            count * times,
                            operation[1] if operation and operation[1] != "XLA_Args" else "",
                            what,
                            COLLECTIVE.match(one.opcode) is not None,
                        )
                    )
        return found

    def _bytes(self, one: Instruction, there: dict[str, Instruction]) -> tuple[float, str]:
        result = one.shapes[0]
        operands = [shape for name in one.operands if name in there for shape in there[name].shapes]
        if one.opcode == "async-done":
            begun = there[one.operands[0]]
            name = next(name for name in (one.name, begun.name) if name)
            operands = [shape for shape in begun.shapes if shape.dims and shape != result]
            if begun.operands and there[begun.operands[0]].opcode == "async-start":  # its operands are the update's
                operands = [there[each].shapes[0] for each in begun.operands[1:] if each in there]
            else:
                operands = [there[each].shapes[0] for each in begun.operands if each in there]
            if "gather" in name:
                return 2 * result.main, f"gather of {result}"
            if "scatter" in name and len(operands) > 2:
                return 3 * operands[2].main, f"scatter of {operands[2]} into {result}"
            return operands[0].main + result.main if operands else result.main, _copied(operands, result)
        if one.opcode in ("copy-start", "slice-start"):
            to, source = (one.shapes[0], one.shapes[1]) if one.opcode == "copy-start" else one.shapes[1::-1]
            taken = source.main if one.opcode == "copy-start" else min(source.main, to.stored)
            return taken + to.main, f"{source} {'to' if source.main else 'from'} on-chip memory"
        if one.opcode == "custom-call" and re.search(r'target="(\w*Bitcast|Assume\w+|Sharding|\w*Slice\w*)"', one.line):
            return 0, ""
        inside = self.computations.get(one.attribute("calls") or "", {})
        if one.opcode != "fusion" or not inside:
            if one.opcode in ("gather", "dynamic-slice"):
                return 2 * result.main + sum(s.main for s in operands[1:]), f"{one.opcode} of {result}"
            if one.opcode in ("scatter", "dynamic-update-slice"):
                update = operands[2 if one.opcode == "scatter" else 1]
                return 3 * update.main, f"{one.opcode} of {update} into {result}"
            count = sum(shape.main for shape in [*operands, *one.shapes])
            if one.opcode == "copy":
                return count, _copied(operands, result)
            return count, f"{one.opcode}: {', '.join(map(str, operands[:3]))} to {result}"
        return self._fusion(one, inside, there)

    def _fusion(self, one: Instruction, inside: dict, there: dict) -> tuple[float, str]:
        users: dict[str, list[Instruction]] = {}
        for each in inside.values():
            for name in each.operands:
                users.setdefault(name, []).append(each)

        def read(name: str) -> list[tuple[Instruction, str]]:
            """Who reads a value, past renamings: (reader, the name by which it reads)."""
            found = []
            for user in users.get(name, []):
                found += read(user.name) if user.opcode == "bitcast" else [(user, name)]
            return found

        count, in_place, what = 0.0, [], ""
        for parameter in (each for each in inside.values() if each.opcode == "parameter"):
            number = int(re.search(r" parameter\((\d+)\)", parameter.line)[1])
            source = there.get(one.operands[number]) if number < len(one.operands) else None
            if source is None or not source.shapes[0].main:
                continue
            readers, whole = read(parameter.name), 0
            for reader, name in readers:
                first = reader.operands and reader.operands[0] == name
                if first and reader.opcode in ("gather", "dynamic-slice"):
                    taken = reader.shapes[0]  # perhaps in another dtype: it is converted on the way
                    count += taken.stored / _size(taken.dtype) * _size(parameter.shapes[0].dtype)
                    what = what or f"{reader.opcode} of {taken} out of {parameter.shapes[0]}"
                elif first and reader.opcode in ("scatter", "dynamic-update-slice"):
                    update = inside[reader.operands[2 if reader.opcode == "scatter" else 1]].shapes[0]
                    count += 2 * update.stored
                    in_place.append(reader.shapes[0])
                    what = f"{reader.opcode} of {update} into {reader.shapes[0]}"
                else:
                    whole = parameter.shapes[0].stored
            count += whole
        for shape in one.shapes:
            if any(shape.dims == other.dims for other in in_place):
                in_place = [other for other in in_place if other.dims != shape.dims]
            else:
                count += shape.main
        sources = [str(there[name].shapes[0]) for name in one.operands if name in there]
        return count, what or f"{one.name.split('.')[0]}: {', '.join(sources[:3])} to {one.shapes[0]}"


def compact(dims: tuple[int, ...], dtype: str) -> int:
    """Bytes that a TPU keeps an argument of a program in: of all orders of its dimensions that with least padding.

    Tiles are 8 sublanes by 128 lanes of 32 bits, four times as many sublanes of 8 bits; fewer than 8 rows have a tile
    of 1, 2 or 4. So [1,000,000, 16] lies there as 16 rows of a million without padding, not as rows of 16 in 128 lanes.

    Args:
      dtype: as TensorFlow or XLA calls it, float32 or f32.
    """
    size = int(_size(re.sub(r"^(bf|f|u|s|c|int|float|uint|bfloat|complex)[a-z]*(?=\d)", _short, dtype)))
    if len(dims) < 2:
        length = math.prod(dims)
        return (
            math.ceil(length / 1024) * 1024 if length > 1024 else math.ceil(length / 128) * 128 if dims else 1
        ) * size
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
