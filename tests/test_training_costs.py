"""Training priced: hand arithmetic, what bounds it, break-even points, and a plan from what the files have."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from recsys_common import costs, prices, tpu, training_costs
from recsys_common.training_costs import Machine

ROOT = Path(__file__).resolve().parent.parent
# A bound of 36 us for 3,600 rows is 100 M rows/s; a measured step of 3.6 ms for 3,600 rows is 1 M rows/s.
TPU = Machine("v5e:2x2", "tpu_v5e", 3600, 36e-6, bound="memory", chips=4, model="mf 100M")
CPU = Machine("cpu", "cpu", 3600, 3.6e-3, measured=True, model="mf")
HOUR = 3600e6  # examples of an hour at 1 M rows/s


def own(**given: float) -> dict:
    return costs.given(costs.load_prices(), **given)


# One machine -------------------------------------------------------------------------------------------


def test_hours_and_cost_are_hand_arithmetic():
    assert training_costs.rows_per_second(TPU, 0.25) == pytest.approx(25e6)
    assert training_costs.hours(TPU, 25 * HOUR, 0.25) == pytest.approx(1)
    assert training_costs.chip_hours(TPU, 25 * HOUR, 0.25) == pytest.approx(4)
    assert training_costs.cost(TPU, own(tpu_v5e=1.5), 25 * HOUR, 0.25) == pytest.approx(6)
    assert training_costs.cost(TPU, own(cpu=1.5), 25 * HOUR, 0.25) is None  # unread, not free
    assert training_costs.cost(TPU, own(tpu_v5e=0), 25 * HOUR, 0.25) == 0
    # 1e9 examples where none are named, and half of the bound: 1e9 / 50e6 / 3600 hours
    assert training_costs.hours(TPU) == pytest.approx(20 / 3600)


def test_a_measured_step_has_its_utilisation_in_it():
    assert {training_costs.rows_per_second(CPU, share) for share in training_costs.UTILISATIONS} == {1e6}
    assert training_costs.UTILISATIONS[0] == 0.1 and training_costs.UTILISATIONS[-1] == 1
    assert training_costs.UTILISATION in training_costs.UTILISATIONS
    curve = [training_costs.chip_hours(TPU, utilisation=share) for share in training_costs.UTILISATIONS]
    assert curve == sorted(curve, reverse=True) and curve[0] == pytest.approx(10 * curve[-1])


def test_chips_wait_for_an_input_that_is_slower():
    fed = replace(TPU, input_rows=30e6, hosts=2)  # 60 M rows/s
    assert training_costs.rows_per_second(fed, 0.5) == pytest.approx(50e6)
    assert training_costs.bound_by(fed, 0.5) == "memory"
    assert training_costs.rows_per_second(fed, 0.7) == pytest.approx(60e6)
    assert training_costs.bound_by(fed, 0.7) == "input"
    assert training_costs.cost(fed, own(tpu_v5e=1), 60 * HOUR, 1) == pytest.approx(4)  # waiting is paid for
    assert training_costs.input_needed(fed) == pytest.approx(50e6)  # of each host, 100 M of both
    assert training_costs.input_needed(fed, 0.6) == pytest.approx(30e6)
    enough = replace(fed, input_rows=training_costs.input_needed(fed, 0.9))
    assert training_costs.bound_by(enough, 0.9) == "memory" and training_costs.bound_by(enough, 0.91) == "input"


def test_the_input_of_a_cpu_takes_the_cores_of_the_step():
    # a microsecond a row for the step, and a quarter for the input
    fed = replace(CPU, input_rows=4e6)
    assert training_costs.rows_per_second(fed) == pytest.approx(1e6 / 1.25)
    assert training_costs.bound_by(fed) == "step" and training_costs.bound_by(replace(CPU, input_rows=5e5)) == "input"
    gpu = replace(fed, kind="gpu_l4")
    assert training_costs.rows_per_second(gpu) == pytest.approx(1e6)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, math.nan])
def test_a_utilisation_is_a_share(share):
    with pytest.raises(ValueError, match=f"utilisation {share}, expected a share above 0, 1 at most"):
        training_costs.hours(TPU, utilisation=share)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "v5e:2x2: rows 0, expected a number above 0"),
        ({"step_seconds": math.nan}, "step_seconds nan"),
        ({"input_rows": -1}, "input_rows -1"),
        ({"chips": 0}, "chips 0"),
        ({"kind": "tpu_v9"}, "kind 'tpu_v9', expected one of cpu, gpu_l4"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TPU, **change)


# From the compiler -------------------------------------------------------------------------------------


def test_a_report_becomes_a_machine():
    report = tpu.Report(
        "v5e:4x4", True, chips=16, rows=8192, flops=2e9, bytes=8e6,
        peak={"flops": 1e12, "bandwidth": 1e9, "interconnect": 1e9},
    )  # fmt: skip
    found = training_costs.machine(report, input_rows=5e6, model="mf")
    # 2 ms of compute, 8 ms of memory; eight chips a host
    assert found == Machine(
        "v5e:4x4", "tpu_v5e", 8192, 8e-3, False, "memory", chips=16, hosts=2, input_rows=5e6, model="mf"
    )
    assert training_costs.machine(report.row("a case"), input_rows=5e6, model="mf") == found
    timed = tpu.Report("cpu", True, rows=64, steps=(0.3, 0.1, 0.2))
    assert training_costs.machine(timed) == Machine("cpu", "cpu", 64, 0.2, True)
    assert training_costs.machine(tpu.Report("v4:2x2x2", True, chips=8, rows=8, steps=(1.0,))).hosts == 2
    with pytest.raises(ValueError, match="cpu: no measured step, and no bound"):
        training_costs.machine(tpu.Report("cpu", True, rows=64))
    with pytest.raises(ValueError, match="v5e:1x1: does not compile, so it has no cost"):
        training_costs.machine(tpu.Report("v5e:1x1", False, rows=64))
    with pytest.raises(ValueError, match="v5e:1x1: does not fit"):
        training_costs.machine(replace(report, topology="v5e:1x1", arguments=17, available=16))


def test_a_row_of_the_benchmark_becomes_a_machine():
    row = {"case": "mf v6e:1x1", "model": "mf", "topology": "v6e:1x1", "compiles": True, "rows": 8, "chips": 1,
           "bound": "compute", "step_seconds_at_least": 0.5}  # fmt: skip
    assert training_costs.machine(row) == Machine("v6e:1x1", "tpu_v6e", 8, 0.5, bound="compute", model="mf")
    timed = training_costs.machine(row | {"topology": "H100", "step_seconds": 0.75})
    assert (timed.kind, timed.step_seconds, timed.measured) == ("gpu_h100", 0.75, True)
    found = training_costs.machine(row | {"dim": 64, "split_tables": True})
    assert (found.name, found.model) == ("v6e:1x1 split", "mf, dimension 64")
    with pytest.raises(ValueError, match=r"mf v6e:1x1: does not fit into the chip's memory, so it has no cost"):
        training_costs.machine(row | {"fits": False})
    with pytest.raises(ValueError, match=r"mf v6e:1x1: no compiles, rows"):
        training_costs.machine({name: row[name] for name in row if name not in ("rows", "compiles")})
    with pytest.raises(ValueError, match=r"v9:1: prices.json has cpu, .*, and nothing for 'v9'"):
        training_costs.machine(row | {"topology": "v9:1"})


def test_every_chip_of_the_compile_check_has_a_price_of_its_own():
    chips = json.loads((ROOT / "recsys_common" / "chips.json").read_text())
    chips = {name: chip for name, chip in chips.items() if "topology" in chip}
    for name, chip in chips.items():
        row = {"topology": chip["topology"], "compiles": True, "fits": True, "rows": 1, "step_seconds_at_least": 1.0}
        if name.startswith("v"):
            assert training_costs.machine(row).kind == f"tpu_{name}"
    assert {name for name in chips if name.startswith("v")} == set(training_costs.HOST_CHIPS)
    for kind in prices.MACHINES:
        assert costs.load_prices()[kind]["unit"].startswith("hour of ")


# Break-even --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fed", [math.inf, 3e6, 40e6])
def test_at_the_ratio_of_break_even_both_cost_the_same(fed):
    one, other = replace(TPU, input_rows=fed), replace(CPU, input_rows=fed)
    ratio = training_costs.break_even_price(one, other, 0.5)
    money = own(tpu_v5e=0.2 * ratio, cpu=0.2)
    equal = [training_costs.cost(machine, money, 1e9, 0.5) for machine in (one, other)]
    assert equal[0] == pytest.approx(equal[1]) and equal[0] > 0
    assert training_costs.cost(one, own(tpu_v5e=0.19 * ratio), 1e9, 0.5) < equal[1]
    assert training_costs.break_even_price(other, one, 0.5) == pytest.approx(1 / ratio)


def test_break_even_is_hand_arithmetic():
    # 50 M rows/s of four chips, against 1 M rows/s: a chip does what 12.5 CPUs do
    assert training_costs.break_even_price(TPU, CPU, 0.5) == pytest.approx(12.5)
    # a chip that costs 5 CPUs, four of them: 20 M rows/s are needed, of 100 M
    assert training_costs.break_even_utilisation(TPU, CPU, 5) == pytest.approx(0.2)
    assert training_costs.break_even_utilisation(replace(TPU, chips=2), CPU, 5) == pytest.approx(0.1)
    assert training_costs.break_even_utilisation(TPU, replace(CPU, chips=2), 5) == pytest.approx(0.1)
    assert training_costs.break_even_utilisation(TPU, CPU, 25) == pytest.approx(1)
    assert training_costs.break_even_utilisation(TPU, CPU, 26) is None
    # with an input of 19 M rows/s no utilisation makes 20; one of 21 M does
    assert training_costs.break_even_utilisation(replace(TPU, input_rows=19e6), CPU, 5) is None
    assert training_costs.break_even_utilisation(replace(TPU, input_rows=21e6), CPU, 5) == pytest.approx(0.2)
    # the other's utilisation counts where its step is a bound too: 100 M * 0.3 = 30 M rows/s
    other = replace(TPU, kind="tpu_v4", chips=4)
    assert training_costs.break_even_utilisation(TPU, other, 2, utilisation=0.3) == pytest.approx(0.6)
    for one in (CPU, replace(TPU, measured=True), replace(CPU, measured=False)):
        with pytest.raises(ValueError, match="expected a GPU or TPU whose step is a bound"):
            training_costs.break_even_utilisation(one, TPU, 1)


# The plan ----------------------------------------------------------------------------------------------


def benchmarks(folder: Path) -> Path:
    machine = {"cpu": "a made-up CPU", "cores": 3, "memory_gb": 7}

    def write(name, rows):
        content = {"name": name, "date": "2026-02-03T04:05:06+00:00", "machine": machine, "rows": rows}
        (folder / f"{name}.json").write_text(json.dumps(content))

    # 8192 rows in 8.192 ms and an input of 4 M rows/s: 1.25 us a row
    write("input_pipeline", [{"case": training_costs.INPUT, "value": 4, "unit": "M rows/s"}])
    bounds = {"v5e:1x1": 1e-3, "v6e:1x1": 0.5e-3}
    rows = [
        {"case": f"matrix factorization, dimension 16, {topology}", "model": "matrix factorization", "dim": 16,
         "topology": topology, "compiles": True, "fits": True, "flops": 1.0, "bytes": 1.0, "part": "models",
         "bound": "memory", "step_seconds_at_least": seconds, "rows": 4000, "chips": 1}
        for topology, seconds in bounds.items()
    ]  # fmt: skip
    rows.append(rows[0] | {"case": "two-tower v4", "model": "two-tower", "topology": "v4", "chips": 4})
    rows.append(rows[0] | {"case": "two-tower v5e", "model": "two-tower", "compiles": False, "rows": 0})
    rows.append(rows[0] | {"case": "large v5e", "fits": False})
    rows.append(rows[0] | {"case": "variant batch 2,048", "part": "variants"})
    case = "cpu by TensorFlow: matrix factorization, dimension 16, batch 8,192: step"
    rows.append({"case": case, "value": 0.008192, "unit": "s"})
    rows.append({"case": "cpu: two-tower, dimension 16, batch 1,000: step", "value": 0.5, "unit": "s"})
    rows.append({"case": "cpu: two-tower, dimension 16, batch 1,000: predicted", "value": 0.4, "unit": "s"})
    write("tpu_rehearsal", rows)
    return folder


def cells(text: str, name: str) -> list[list[str]]:
    return [re.split(r"  +", line)[1:] for line in text.splitlines() if re.match(f"{re.escape(name)}  ", line)]


def test_the_plan_is_hand_arithmetic(tmp_path):
    money = own(cpu=0.1, tpu_v5e=0.4)
    text = training_costs.plan(money, 2e9, 0.5, folder=benchmarks(tmp_path))
    # 4000 rows in 2 ms at half of the bound are 2 M rows/s; 1e9 take 500 s
    step, paid, even = cells(text, "v5e:1x1")
    assert step == ["4,000", "2.00", "2.00", "memory", "2.00", "0.14", "0.28"]
    assert paid == ["0.69", "0.14", "0.069", "0.28", "0.056", "0.028", "0.11"]
    # 0.4, 2 and 4 M rows/s against 0.8; at four times the price 3.2 of 4 M rows/s
    assert even == ["0.50", "2.50", "5.00", "80.0%"]
    step, paid, even = cells(text, "v6e:1x1")
    assert step[2:5] == ["4.00", "memory", "4.00"] and paid[3:] == ["unread"] * 4
    assert even == ["1.00", "5.00", "5.00", "unread"]  # the input gives no more than 4 M rows/s
    step, paid = cells(text, "cpu, measured")
    assert step == ["8,192", "8.19", "0.80", "step", "1.00", "0.35", "0.69"]
    assert paid == ["0.35"] * 3 + ["0.035"] * 3 + ["0.069"]
    assert "two-tower v5e: does not compile, so it has no cost" in text and "large v5e: does not fit" in text
    assert text.count("v5e:1x1  ") == 3  # once in each table: the variant is none of them
    # 1000 rows in half a second, and a quarter of a millisecond for their input
    assert cells(text, "cpu XLA, measured")[0][:4] == ["1,000", "500", "0.002", "step"]
    assert "TWO-TOWER, DIMENSION 16\n" in text and text.count("so many hours of the CPU") == 2
    assert "cost: in your currency." in text and "Input: 4.0 M rows/s a host." in text
    assert "Utilisation: 50% of a bound, an assumption; ranges: 10% to 100%." in text
    assert "3 cores (a made-up CPU)" in text and text.count("of 2026-02-03") == 2
    assert text.count("\ncpu, measured") == 2 and text.index("\ncpu XLA") < text.index("\nv4  ")  # the CPU is first
    assert "GPU" not in text and [line for line in text.splitlines() if len(line) >= 120] == []


def test_your_own_input_and_utilisation_are_taken(tmp_path):
    text = training_costs.plan(own(), 1e9, 1.0, input_rows=6e6, folder=benchmarks(tmp_path))
    assert cells(text, "v6e:1x1")[0][2:5] == ["6.00", "input", "8.00"]
    assert "Input: 6.0 M rows/s a host." in text and "cost: no price of these was read or given." in text


def test_a_plan_says_which_files_are_absent(tmp_path):
    benchmarks(tmp_path)
    (tmp_path / "input_pipeline.json").unlink()
    text = training_costs.plan(own(), folder=tmp_path)
    assert "Input: taken to be fast enough." in text and cells(text, "cpu, measured")[0][2] == "1.00"
    assert "benchmarks/input_pipeline.json does not exist: `make bench` makes it" in text
    (tmp_path / "tpu_rehearsal.json").unlink()
    text = training_costs.plan(own(), folder=tmp_path)
    assert "No step is known." in text and text.count("does not exist") == 2


def test_the_committed_files_give_a_plan():
    text = training_costs.plan(costs.load_prices())
    steps = {row["case"]: row for row in json.loads((ROOT / "benchmarks/tpu_rehearsal.json").read_text())["rows"]}
    of_model = "matrix factorization, dimension 16"
    measured = steps[f"cpu by TensorFlow: {of_model}, batch 8,192: step"]
    assert measured["unit"] == "s" and steps[f"{of_model}, v6e:1x1"]["rows"] == 8192  # the same model and batch
    begin = text.index(of_model.upper())
    assert cells(text[begin:], "cpu, measured")[0][1] == prices.figure(measured["value"] * 1e3)
    speeds = json.loads((ROOT / "benchmarks" / "input_pipeline.json").read_text())["rows"]
    assert [row["unit"] for row in speeds if row["case"] == training_costs.INPUT] == ["M rows/s"]
    assert [line for line in text.splitlines() if len(line) >= 120] == []
