"""What does training cost on this machine or that one, and where is the break-even point?

    prices = given(load_prices(), tpu_v5e=1.5, cpu=0.1)                  # prices.py: an hour of a chip, of a machine
    v5e = training_costs.machine(report, input_rows=50e6)                # of tpu.aot_compile, or a row of its benchmark
    training_costs.cost(v5e, prices, examples=1e9, utilisation=0.5)      # None while the price is unread
    [training_costs.chip_hours(v5e, utilisation=u) for u in training_costs.UTILISATIONS]         # needs no price
    print(training_costs.plan(prices))                                   # costs.py --chapter 5

A step takes what was measured, or what `tpu.Report` says that it takes at least, divided by the utilisation: the share
of the bound that is reached. Nobody measured that share; it is an assumption, so every cost is a range over it. The
input pipeline can be slower than the chips: then they wait, and are paid for. Checkpoints, evaluation, starts and what
is lost when a machine is taken away come on top.

Needs: prices.py prices.json
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path

from recsys_common.prices import MACHINES, figure, price_list

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
UTILISATION = 0.5  # assumed where none is given; `UTILISATIONS` is the range of a slider or a curve
UTILISATIONS = tuple(tenths / 10 for tenths in range(1, 11))
HOST_CHIPS = {"v4": 4, "v5e": 8, "v5p": 4, "v6e": 8}  # that one host feeds, as the pages of chips.json say
INPUT = "shuffled record batches"
# Of tpu_rehearsal.json: steps of this CPU with smaller tables, which no row-sparse optimizer notices (chapter 4).
CPU_STEP = re.compile(r"cpu( by TensorFlow)?: (.+), batch ([\d,]+): step")

# What is read of a report; a row of the benchmark must have the first four.
REPORTED = ("topology", "compiles", "rows", "step_seconds_at_least", "fits", "steps", "chips", "bound")


@dataclasses.dataclass(frozen=True)
class Machine:
    """One model's step on one machine or slice. Raises ValueError for numbers that cannot be."""

    name: str
    kind: str  # its entry in prices.json, the price of one chip for an hour
    rows: int  # of the batch, all chips together
    step_seconds: float  # measured, or at least
    measured: bool = False  # then the utilisation is in it already
    bound: str = ""  # what the bound is of: compute, memory or interconnect
    chips: int = 1
    hosts: int = 1
    input_rows: float = math.inf  # rows/s that the input pipeline of one host gives
    model: str = ""

    def __post_init__(self):
        for name in ("rows", "step_seconds", "chips", "hosts", "input_rows"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{self.name}: {name} {getattr(self, name)}, expected a number above 0")
        if self.kind not in MACHINES:
            raise ValueError(f"{self.name}: kind {self.kind!r}, expected one of {', '.join(MACHINES)}")


def machine(report, input_rows: float = math.inf, model: str = "") -> Machine:
    """The machine of a `tpu.Report`, or of a row of benchmarks/tpu_rehearsal.json (a dict).

    Seconds that were measured (`steps` of a report, `step_seconds` of a row) are taken before the lower bound.

    Args:
      input_rows: rows/s of the input pipeline of one host; without it, input is taken to be fast enough.

    Raises:
      ValueError: it does not compile or fit, has no seconds, or runs on what prices.json does not have.
    """
    row = report if isinstance(report, Mapping) else {name: getattr(report, name) for name in REPORTED}
    if missing := [name for name in REPORTED[:4] if name not in row]:
        raise ValueError(f"{row.get('case', row)}: no {', '.join(missing)}")
    name, family = row["topology"], row["topology"].split(":")[0].lower()
    if refused := _refused(row):
        raise ValueError(f"{row.get('case', name)}: {refused}")
    kinds = [kind for kind in (family, f"tpu_{family}", f"gpu_{family}") if kind in MACHINES]
    if not kinds:
        raise ValueError(f"{name}: prices.json has {', '.join(MACHINES)}, and nothing for {family!r}")
    steps = row.get("steps") or ([row["step_seconds"]] if row.get("step_seconds") else [])
    if not (seconds := statistics.median(steps) if steps else row.get("step_seconds_at_least")):
        raise ValueError(f"{row.get('case', name)}: no measured step, and no bound; on a CPU, pass seconds= to time it")
    chips = row.get("chips") or 1
    hosts, bound = math.ceil(chips / HOST_CHIPS.get(family, 8)), row.get("bound") or ""
    dimension = f", dimension {row['dim']}" if "dim" in row else ""
    model = model or row.get("model", "") + dimension
    name += " split" if row.get("split_tables") else ""
    return Machine(name, kinds[0], row["rows"], seconds, bool(steps), bound, chips, hosts, input_rows, model)


def _refused(row: Mapping) -> str:
    if not row.get("compiles", True):
        return "does not compile, so it has no cost"
    return "" if row.get("fits", True) else "does not fit into the chip's memory, so it has no cost"


# What a machine does and costs ------------------------------------------------------------------------


def rows_per_second(one: Machine, utilisation: float = UTILISATION) -> float:
    """Of all chips together: min(rows / step_seconds * utilisation, hosts * input_rows).

    A measured step has its utilisation in it: then 1 is taken. The input of a CPU uses the cores of the step, so the
    two follow one another: 1 / (step_seconds / rows + 1 / (hosts * input_rows)).
    """
    steps, given = _rates(one, utilisation)
    return 1 / (1 / steps + 1 / given) if one.kind == "cpu" else min(steps, given)


def bound_by(one: Machine, utilisation: float = UTILISATION) -> str:
    """What to make faster: "input", or the bound of the step: compute, memory, interconnect; "step": not known."""
    steps, given = _rates(one, utilisation)
    return "input" if given < steps else one.bound or "step"


def _rates(one: Machine, utilisation: float) -> tuple[float, float]:
    """Rows/s of the steps alone, and of the input alone."""
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation {utilisation}, expected a share above 0, 1 at most")
    steps = one.rows / one.step_seconds * (1 if one.measured else utilisation)
    return steps, one.hosts * one.input_rows


def input_needed(one: Machine, utilisation: float = 1.0) -> float:
    """Rows/s that the input pipeline of each host must give, so that no chip waits."""
    return _rates(one, utilisation)[0] / one.hosts


def hours(one: Machine, examples: float = 1e9, utilisation: float = UTILISATION) -> float:
    """Hours that so many examples take: examples / rows_per_second / 3600."""
    return examples / rows_per_second(one, utilisation) / 3600


def chip_hours(one: Machine, examples: float = 1e9, utilisation: float = UTILISATION) -> float:
    """What is paid for, whatever its price: hours * chips."""
    return hours(one, examples, utilisation) * one.chips


def cost(one: Machine, prices: dict, examples: float = 1e9, utilisation: float = UTILISATION) -> float | None:
    """chip_hours * price, in the currency of the prices (prices.py); None: it is unread."""
    price = prices[one.kind]["price"]
    return None if price is None else chip_hours(one, examples, utilisation) * price


# Break-even -------------------------------------------------------------------------------------------


def break_even_price(one: Machine, other: Machine, utilisation: float = UTILISATION) -> float:
    """How many times the other's price an hour of one's chip may cost, for the same cost of an example.

    chip_hours(other) / chip_hours(one): below this ratio of prices `one` is cheaper, above it `other`.
    """
    return chip_hours(other, 1, utilisation) / chip_hours(one, 1, utilisation)


def break_even_utilisation(
    one: Machine, other: Machine, price_ratio: float, utilisation: float = UTILISATION
) -> float | None:
    """The utilisation of `one` at which an example costs the same; above it `one` is cheaper. None: at none up to 1.

    `one` must give rows_per_second(other) * price_ratio * one.chips / other.chips, which needs that many rows/s times
    one.step_seconds / one.rows. None also where the input of `one` does not give so many rows.

    Args:
      price_ratio: price of an hour of one's chip, divided by that of the other's.
      utilisation: of the other, where its step was not measured.

    Raises ValueError if the step of `one` was measured, which leaves no utilisation to find, or if it is a CPU.
    """
    if one.measured or one.kind == "cpu":
        raise ValueError(f"{one.name}: expected a GPU or TPU whose step is a bound; this one is measured, or a CPU")
    needed = rows_per_second(other, utilisation) * price_ratio * one.chips / other.chips
    share = needed * one.step_seconds / one.rows
    return share if share <= 1 and needed <= one.hosts * one.input_rows else None


# The plan ---------------------------------------------------------------------------------------------


def machines(folder: str | Path | None = None, input_rows: float | None = None) -> tuple[list[Machine], list[str]]:
    """The machines whose steps the benchmark files have, and notes: where they come from, what is absent or refused.

    In `folder`, or this checkout's benchmarks: tpu_rehearsal.json has the CPU's measured steps, by TensorFlow and
    through XLA, and bounds of TPUs; input_pipeline.json the input's rows/s, taken for each host unless `input_rows` is.
    """
    found, notes, files = [], [], {}
    for name in ("input_pipeline", "tpu_rehearsal"):
        path = Path(folder or BENCHMARKS) / f"{name}.json"
        files[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
        known = f"of {files[name]['date'][:10]}" if path.is_file() else "does not exist: `make bench` makes it"
        notes.append(f"  benchmarks/{name}.json {known}")
    speeds = {row["case"]: row["value"] for row in files["input_pipeline"]["rows"]}
    if input_rows is None:
        input_rows = speeds[INPUT] * 1e6 if INPUT in speeds else math.inf
        notes[0] += f": {INPUT!r} on that machine; a host's own: --input-rows" * (INPUT in speeds)
    for row in files["tpu_rehearsal"]["rows"]:
        if timed := CPU_STEP.fullmatch(row["case"]):
            name, rows = "cpu" if timed[1] else "cpu XLA", int(timed[3].replace(",", ""))
            found.append(Machine(name, "cpu", rows, row["value"], True, input_rows=input_rows, model=timed[2]))
        elif "topology" in row and row.get("part") != "variants":
            if refused := _refused(row):
                notes.append(f"  {row['case']}: {refused}")
            else:
                found.append(machine(row, input_rows))
    if any(one.kind == "cpu" for one in found):
        cores, cpu = (files["tpu_rehearsal"]["machine"][name] for name in ("cores", "cpu"))
        notes[1] += f"; its CPU, {cores} cores ({cpu}), had smaller tables"
    return sorted(found, key=lambda one: ("cpu", "cpu XLA").index(one.name) if one.kind == "cpu" else 2), notes


def plan(
    prices: dict, examples: float = 50e9, utilisation: float = UTILISATION, input_rows: float | None = None,
    folder: str | Path | None = None,
) -> str:  # fmt: skip
    """Chapter 5: hours, chip-hours and money of `examples` examples on each machine, and the break-even points."""
    found, notes = machines(folder, input_rows)
    shares = sorted({UTILISATIONS[0], utilisation, UTILISATIONS[-1]})
    fed = {f"{one.input_rows / 1e6:,.1f} M rows/s a host" for one in found if math.isfinite(one.input_rows)}
    lines = [f"TRAINING ON {examples:,.0f} EXAMPLES", "", f"Input: {fed.pop() if fed else 'taken to be fast enough'}."]
    lines.append(
        f"Utilisation: {utilisation:.0%} of a bound, an assumption; ranges: {shares[0]:.0%} to {shares[-1]:.0%}."
    )
    lines.append("A measured step has its utilisation in it. What training costs beside its steps comes on top.")
    for model in dict.fromkeys(one.model for one in found):
        compared = sorted((one for one in found if one.model == model), key=lambda one: one.kind != "cpu")  # CPUs first
        lines += ["", model.upper(), *_steps(compared, examples, utilisation)]
        lines += ["", *_paid(compared, prices, examples, utilisation, shares)]
        lines += _break_even(compared, prices, utilisation, shares)
    used = [kind for kind in MACHINES if kind in {one.kind for one in found}]
    lines += ["", f"h: hours of one chip, paid for. cost: {_currency(prices, used)}." if found else "No step is known."]
    return "\n".join([*lines, "", "From", *notes, *price_list({kind: prices[kind] for kind in used or MACHINES})])


def _steps(compared: list[Machine], examples: float, utilisation: float) -> list[str]:
    lines = [_line("", "rows", "ms", "", "", "input M/s", "hours of", "hours of")]
    lines.append(
        _line("machine", "a step", "a step", "M rows/s", "bound by", "needed", "1e9", f"{examples / 1e9:,.3g}e9")
    )
    for one in compared:
        cells = [1e3 * one.rows / _rates(one, utilisation)[0], rows_per_second(one, utilisation) / 1e6]
        last = [input_needed(one, utilisation) / 1e6, *(hours(one, count, utilisation) for count in (1e9, examples))]
        cells = [f"{one.rows:,}", *map(_figure, cells), bound_by(one, utilisation), *map(_figure, last)]
        lines.append(_line(_named(one), *cells))
    return lines


def _paid(compared: list[Machine], prices: dict, examples: float, utilisation: float, shares: list) -> list[str]:
    heads = [f"{what} at {share:.0%}" for what in ("h", "cost") for share in shares]
    lines = [_line("1e9 examples", *heads, f"cost {examples / 1e9:,.3g}e9")]
    for one in compared:
        cells = [chip_hours(one, 1e9, share) for share in shares] + [cost(one, prices, 1e9, share) for share in shares]
        lines.append(_line(_named(one), *map(_figure, [*cells, cost(one, prices, examples, utilisation)])))
    return lines


def _break_even(compared: list[Machine], prices: dict, utilisation: float, shares: list) -> list[str]:
    cpu, *others = compared
    if cpu.kind != "cpu" or not others:
        return []
    lines = [
        "",
        "An hour of one chip does the work of so many hours of the CPU. It pays while it costs less than they do;",
    ]
    lines.append("equal at: the utilisation at which both cost the same, at these prices.")
    lines.append(_line("", *[f"at {share:.0%}" for share in shares], "equal at"))
    for one in others:
        price, other = prices[one.kind]["price"], prices[cpu.kind]["price"]
        equal = "unread" if price is None or not other else ""
        if not equal and not one.measured and one.kind != "cpu":
            share = break_even_utilisation(one, cpu, price / other, utilisation)
            equal = "none" if share is None else f"{share:.1%}"
        ratios = [_figure(break_even_price(one, cpu, share)) for share in shares]
        lines.append(_line(_named(one), *ratios, equal or "measured"))
    return lines


def _named(one: Machine) -> str:
    return one.name + (", measured" if one.measured else "")


def _line(name: str, *cells: str) -> str:
    return f"{name:18}" + "".join(f"{cell:>13}" for cell in cells)


def _figure(value: float | None) -> str:
    """As prices.figure, with two digits of what is small, as a TPU's hours for 1e9 examples are; "unread" for None."""
    return "unread" if value is None else figure(value) if value >= 0.1 else f"{value:.2g}"


def _currency(prices: dict, kinds: list[str]) -> str:
    if all(prices[kind]["price"] is None for kind in kinds):
        return "no price of these was read or given"
    return next((price["currency"] for price in prices.values() if price["currency"]), "in your currency")
