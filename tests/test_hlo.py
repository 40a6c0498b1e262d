"""The model of bytes: short programs added up by hand, and a step that the TPU compiler made, against its own sizes."""

import re
from pathlib import Path

import pytest

from recsys_common.hlo import Program, Shape, compact

TABLE = "f32[1000,16]{1,0:T(8,128)}"  # rows: 16 numbers in 128 lanes
STORED = 1000 * 128 * 4


def shape(text: str) -> Shape:
    dtype, dims, layout = re.fullmatch(r"(\w+)\[([\d,]*)\]\{(.*)\}", text).groups()
    return Shape(dtype, tuple(int(length) for length in dims.split(",") if length), layout)


def program(entry: str, *others: str, header: str = "HloModule step, is_scheduled=true") -> Program:
    """A program of an entry computation and others, each `name: lines`."""
    blocks = []
    for name, lines in [*[other.split(":", 1) for other in others], ("ENTRY %main", entry)]:
        body = "\n".join(f"  {line.strip()}" for line in lines.strip().splitlines())
        blocks.append(f"{name} (p: f32[]) -> f32[] {{\n{body}\n}}")
    return Program("\n\n".join([header, *blocks]) + "\n")


def bytes_of(entry: str, *others: str, **more) -> list[float]:
    return [move.bytes for move in program(entry, *others, **more).moves()]


# Shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain", "stored"),
    [
        ("f32[1000,16]{0,1:T(8,128)}", 64_000, 16 * 1024 * 4),  # 16 rows of 1,000 numbers, in 8 tiles of 128
        ("f32[1000,16]{1,0:T(8,128)}", 64_000, 1000 * 128 * 4),  # 1,000 rows of 16, each in 128 lanes
        ("f32[1001,16]{1,0:T(8,128)}", 64_064, 1008 * 128 * 4),
        ("f32[1000,17]{0,1:T(8,128)}", 68_000, 24 * 1024 * 4),
        ("f32[1000,129]{1,0:T(8,128)}", 516_000, 1000 * 256 * 4),
        ("f32[1000,1]{0,1:T(1,128)}", 4_000, 1024 * 4),
        ("bf16[1001,16]{1,0:T(8,128)(2,1)}", 32_032, 1008 * 128 * 2),
        ("pred[33,200]{1,0:T(32,128)(4,1)}", 6_600, 64 * 256),
        ("f32[1000]{0:T(1024)}", 4_000, 4_096),
        ("f32[1025]{0:T(1024)}", 4_100, 8_192),
        ("f32[256]{0:T(256)}", 1_024, 1_024),
        ("f32[3,1000,16]{2,1,0:T(8,128)}", 192_000, 3 * 1000 * 128 * 4),
        ("f32[3,1000,16]{1,2,0:T(8,128)}", 192_000, 3 * 16 * 1024 * 4),
        ("f32[]{:T(128)}", 4, 512),  # a scalar has a tile too
        ("s64[]{:T(128)}", 8, 1024),
        ("f32[1000,16]{1,0}", 64_000, 64_000),  # a CPU has no tiles
        ("f32[1000,16]{}", 64_000, 64_000),
        ("f32[]{}", 4, 4),
        ("s4[16,128]{1,0:T(8,128)}", 1_024, 1_024),
        ("f8e4m3fn[8,128]{1,0:T(8,128)}", 1_024, 1_024),
        ("c64[8,128]{1,0}", 8_192, 8_192),
        ("f32[0,16]{1,0:T(8,128)}", 0, 0),
    ],
)
def test_what_an_array_takes(text, plain, stored):
    one = shape(text)
    assert (one.plain, one.stored, one.main) == (plain, stored, stored if one.dims else plain)


def test_what_lies_on_the_chip_costs_nothing():
    assert shape("f32[1000,16]{1,0:T(8,128)S(1)}").main == shape("f32[1000]{0:T(1024)S(6)}").main == 0
    assert shape("f32[1000,16]{1,0:T(8,128)S(1)}").stored == STORED
    assert shape("f32[1000,16]{1,0:T(8,128)S(0)}").main == STORED


@pytest.mark.parametrize(
    ("dims", "dtype", "expected"),
    [
        ((1000, 16), "float32", 16 * 1024 * 4),  # as columns
        ((100_000_000, 17), "f32", 24 * 100_000_000 * 4),  # seen in programs for v5e and v6e, as are those that follow
        ((1_000_000, 1), "float32", 1_000_064 * 4),
        ((8192, 50), "int32", 56 * 8192 * 4),
        ((256, 128), "float32", 256 * 128 * 4),
        ((26,), "int32", 128 * 4),
        ((8192,), "int32", 8192 * 4),
        ((3265,), "int32", 4096 * 4),
        ((), "float32", 512),
        ((), "int64", 1024),
        ((), "bool", 512),
    ],
)
def test_the_least_padded_way_to_keep_an_argument(dims, dtype, expected):
    assert compact(dims, dtype) == expected


# Instructions ------------------------------------------------------------------------------------------


def test_operands_are_read_and_results_written_but_names_are_free():
    moves = program(f"""
        %a = {TABLE} parameter(0)
        %b = f32[1000,16]{{1,0:T(8,128)S(1)}} parameter(1)
        %c = f32[16,1000]{{0,1:T(8,128)}} bitcast(%a)
        %sum = {TABLE} add(%a, %b), metadata={{op_name="model/AddV2"}}
        %on = f32[1000,16]{{1,0:T(8,128)S(1)}} negate(%b)
        %whole = u32[] partition-id()
        %room = {TABLE} custom-call(), custom_call_target="AllocateBuffer"
        ROOT %t = ({TABLE}, f32[1000,16]{{1,0:T(8,128)S(1)}}) tuple(%sum, %on)
    """).moves()
    assert [(move.bytes, move.operation, move.between_chips) for move in moves] == [(2 * STORED, "model/AddV2", False)]
    assert moves[0].what == "add: f32[1,000,16], f32[1,000,16] to f32[1,000,16]"


def test_a_copy_says_what_padding_costs():
    [turned] = program(f"""
        %a = f32[1000,16]{{0,1:T(8,128)}} parameter(0)
        ROOT %copy = {TABLE} copy(%a), metadata={{op_name="XLA_Args"}}
    """).moves()
    assert turned.bytes == 16 * 1024 * 4 + STORED and turned.operation == ""
    assert turned.what == "copy of f32[1,000,16] into another layout, 1 MB as stored for 0 MB of numbers"


def test_copies_to_and_from_the_chip_cost_the_side_in_main_memory():
    moves = program(f"""
        %a = {TABLE} parameter(0)
        %go = (f32[1000,16]{{1,0:T(8,128)S(1)}}, {TABLE}, u32[]{{:S(2)}}) copy-start(%a)
        %there = f32[1000,16]{{1,0:T(8,128)S(1)}} copy-done(%go)
        %back = ({TABLE}, f32[1000,16]{{1,0:T(8,128)S(1)}}, u32[]{{:S(2)}}) copy-start(%there)
        %home = {TABLE} copy-done(%back)
        %part = (({TABLE}), f32[8,16]{{1,0:T(8,128)S(1)}}, s32[]{{:S(2)}}) slice-start(%a), slice={{[0:8], [0:16]}}
        %eight = f32[8,16]{{1,0:T(8,128)S(1)}} slice-done(%part)
        %other = ({TABLE}, {TABLE}, u32[]{{:S(2)}}) copy-start(%home)
        ROOT %end = {TABLE} copy-done(%other)
    """).moves()
    assert [move.bytes for move in moves] == [STORED, STORED, 8 * 128 * 4, 2 * STORED]
    assert moves[0].what == "f32[1,000,16] to on-chip memory" and moves[1].what == "f32[1,000,16] from on-chip memory"
    assert moves[3].what.startswith("copy of f32[1,000,16], 1 MB")


def test_a_gather_reads_the_rows_that_it_returns():
    """32 rows, as they lie in their table: 128 lanes each, or 16 numbers each where the table is kept as columns."""
    lines = """
        %t = f32[1000,16]{{{order}:T(8,128)}} parameter(0)
        %ids = s32[32]{{0:T(128)}} parameter(1)
        ROOT %g = f32[32,16]{{1,0:T(8,128)}} gather(%t, %ids), offset_dims={{1}}
    """
    ids, result = 128 * 4, 32 * 128 * 4
    assert bytes_of(lines.format(order="1,0")) == [32 * 128 * 4 + ids + result]
    assert bytes_of(lines.format(order="0,1")) == [pytest.approx(32 * 16 * 4 * 1.024 + ids + result)]
    fused = """
        ROOT %f = f32[32,16]{{1,0:T(8,128)}} fusion(%t, %ids), kind=kCustom, calls=%gathers
    """
    entry = lines.replace(lines.strip().splitlines()[-1], fused.strip())
    inside = f"""%gathers:
        %p0 = {TABLE} parameter(0)
        %p1 = s32[32]{{0:T(128)}} parameter(1)
        %p0.again = {TABLE} bitcast(%p0)
        ROOT %g = bf16[32,16]{{1,0:T(8,128)(2,1)}} gather(%p0.again, %p1), offset_dims={{1}}
    """  # converted on the way: what is read is float32
    assert bytes_of(entry.format(order="1,0"), inside) == [32 * 128 * 4 + ids + result]
    outer = f"""%outer:
        %q1 = s32[32]{{0:T(128)}} parameter(1)
        %q0 = {TABLE} parameter(0)
        ROOT %inner = f32[32,16]{{1,0:T(8,128)}} fusion(%q0, %q1), kind=kLoop, calls=%gathers
    """  # a fusion in a fusion is looked into
    nested = program(entry.format(order="1,0").replace("%gathers", "%outer"), inside, outer).moves()
    assert [move.bytes for move in nested] == [32 * 128 * 4 + ids + result]
    assert nested[0].what == "gather of bf16[32,16] out of f32[1,000,16]"
    whole = inside.replace("bf16[32,16]{1,0:T(8,128)(2,1)} gather(%p0.again, %p1), offset_dims={1}",
                           "f32[32,16]{1,0:T(8,128)} custom-call(%p0.again, %p1)")  # fmt: skip
    assert bytes_of(entry.format(order="1,0"), whole) == [STORED + ids + result]


SCATTER = f"""
    %t = {TABLE} parameter(0)
    %ids = s32[32]{{0:T(128)}} parameter(1)
    %new = f32[32,16]{{1,0:T(8,128)}} parameter(2)
"""


def test_a_scatter_in_place_reads_and_writes_the_rows_that_it_changes():
    rows, ids = 32 * 128 * 4, 128 * 4
    plain = f"ROOT %s = {TABLE} scatter(%t, %ids, %new), to_apply=%add"
    assert bytes_of(SCATTER + plain) == [2 * rows + ids + rows]  # the table's rows, twice; the ids; the updates
    fused = f"ROOT %s = {TABLE} fusion(%t, %ids, %new), kind=kCustom, calls=%scatters"
    inside = f"""%scatters:
        %p0 = {TABLE} parameter(0)
        %p1 = s32[32]{{0:T(128)}} parameter(1)
        %p2 = f32[32,16]{{1,0:T(8,128)}} parameter(2)
        %twice = f32[32,16]{{1,0:T(8,128)}} add(%p2, %p2)
        %s = {TABLE} scatter(%p0, %p1, %twice), to_apply=%add
        ROOT %renamed = {TABLE} bitcast(%s)
    """
    [move] = program(SCATTER + fused, inside).moves()
    assert (move.bytes, move.what) == (2 * rows + ids + rows, "scatter of f32[32,16] into f32[1,000,16]")
    # More updates than the table has rows: each reads and writes its own.
    many = bytes_of((SCATTER + fused).replace("[32", "[2000"), inside.replace("[32", "[2000"))
    assert many == [3 * 2000 * 128 * 4 + 2048 * 4]
    # One of two results of the same shape is in place.
    pair = inside.replace(f"ROOT %renamed = {TABLE} bitcast(%s)", f"ROOT %r = ({TABLE}, {TABLE}) tuple(%s, %zero)")
    out = fused.replace(f"%s = {TABLE}", f"%s = ({TABLE}, {TABLE})")
    assert bytes_of(SCATTER + out, pair) == [2 * rows + ids + rows + STORED]
    # Into zeros that the fusion makes itself there is nothing in place: the result is written whole.
    zeros = (
        inside.replace("parameter(0)", "broadcast(%zero), dimensions={}").replace("(1)", "(0)").replace("(2)", "(1)")
    )
    assert bytes_of(SCATTER + fused.replace("%t, ", ""), zeros) == [ids + rows + STORED]
    last = f"%most = f32[]{{}} reduce(%p0, %p1), to_apply=%max\n ROOT %r = ({TABLE}, f32[]{{}}) tuple(%s, %most)"
    both = inside.replace(f"ROOT %renamed = {TABLE} bitcast(%s)", last)
    out = fused.replace(f"%s = {TABLE}", f"%s = ({TABLE}, f32[]{{}})")
    assert bytes_of(SCATTER + out, both) == [STORED + ids + rows + 4]  # where all of the table is read as well


def test_an_update_of_a_slice_writes_it():
    update = f"ROOT %u = {TABLE} dynamic-update-slice(%t, %new, %ids, %ids)"
    rows, ids = 32 * 128 * 4, 128 * 4
    assert bytes_of(SCATTER + update) == [rows + rows + 2 * ids]
    part = "ROOT %u = f32[32,16]{1,0:T(8,128)} dynamic-slice(%t, %ids, %ids), dynamic_slice_sizes={32,16}"
    assert bytes_of(SCATTER + part) == [rows + rows + 2 * ids]
    assert bytes_of(SCATTER + "ROOT %u = f32[32,16]{1,0:T(8,128)} slice(%t), slice={[0:32], [0:16]}") == [2 * rows]


def test_slices_in_a_fusion_read_their_part_and_never_more_than_the_whole():
    inside = """%halves:
        %p0 = f32[1024]{0:T(1024)} parameter(0)
        %a = f32[512]{0:T(512)} slice(%p0), slice={[0:512]}
        %b = f32[512]{0:T(512)} slice(%p0), slice={[1:513]}
        ROOT %c = f32[512]{0:T(512)} add(%a, %b)
    """
    entry = """
        %x = f32[1024]{0:T(1024)} parameter(0)
        ROOT %f = f32[512]{0:T(512)} fusion(%x), kind=kLoop, calls=%halves
    """
    assert bytes_of(entry, inside) == [1024 * 4 + 512 * 4]
    assert bytes_of(entry, inside.replace("512]", "100]").replace("T(512)", "T(128)")) == [2 * 100 * 4 + 512 * 4]


def test_what_a_sparse_core_does_meanwhile_is_counted_at_its_end():
    started = "((), (), (s32[16384]{0:T(1024)}, s32[25]{0:T(1)S(11)}))"
    moves = program(f"""
        {SCATTER}
        %g.start = {started} async-start(), async_execution_thread="sparsecore", calls=%core
        %g.update = (({TABLE}, s32[32]{{0:T(128)}}), f32[32,16]{{1,0:T(8,128)}}, ()) async-update(%g.start, %t, %ids)
        %gather_offload_async_done = f32[32,16]{{1,0:T(8,128)}} async-done(%g.update), metadata={{op_name="Gather"}}
        %s.start = {started} async-start(), async_execution_thread="sparsecore", calls=%core
        %s.update = (({TABLE}), {TABLE}, ()) async-update(%s.start, %t, %ids, %new)
        %scatter_offload_async_done = {TABLE} async-done(%s.update)
        %f.start = {started} async-start(), async_execution_thread="sparsecore", calls=%core
        %f.update = (({TABLE}), f32[1000,16]{{0,1:T(8,128)}}, ()) async-update(%f.start, %scatter_offload_async_done)
        ROOT %sparse-core-data-format-call-done = f32[1000,16]{{0,1:T(8,128)}} async-done(%f.update)
    """, f"""%core:
        %p0 = {TABLE} parameter(0)
        ROOT %custom-call.10 = {TABLE} custom-call(%p0), called_computations={{%called}}
    """).moves()  # fmt: skip
    rows, ids = 32 * 128 * 4, 128 * 4
    assert [move.bytes for move in moves] == [rows + ids + rows, 2 * rows + ids + rows, STORED + 16 * 1024 * 4]
    assert [move.what[:9] for move in moves] == ["gather of", "scatter o", "copy of f"]
    assert moves[2].what.startswith("copy of f32[1,000,16] into another layout")


def test_slices_that_are_fetched_ahead_are_not_the_whole_array():
    """The compiler cuts a large copy into slices, each begun by an async-start with the whole as its operand."""
    entry = """
        %t = s8[96000]{0:T(1024)} parameter(0)
        %a = ((s8[96000]{0:T(1024)}), s8[4096]{0:T(1024)S(1)}, s32[]{:S(2)}) async-start(%t), calls=%first
        %b = ((s8[96000]{0:T(1024)}), s8[4096]{0:T(1024)S(1)}, s32[]{:S(2)}) async-start(%t), calls=%first
        %a.done = s8[4096]{0:T(1024)S(1)} async-done(%a)
        %b.done = s8[4096]{0:T(1024)S(1)} async-done(%b)
        ROOT %both = s8[8192]{0:T(1024)S(1)} custom-call(%a.done, %b.done), custom_call_target="ConcatBitcast"
    """
    inside = """%first:
        %p = s8[96000]{0:T(1024)} parameter(0)
        ROOT %s = s8[4096]{0:T(1024)S(1)} slice(%p), slice={[0:4096]}
    """
    assert bytes_of(entry, inside) == [pytest.approx(4096 * 96_256 / 96_000)] * 2


# Loops and branches ------------------------------------------------------------------------------------

BODY = """%body:
    %p = (s32[], f32[1024]{0:T(1024)}) parameter(0)
    %x = f32[1024]{0:T(1024)} get-tuple-element(%p), index=1
    %y = f32[1024]{0:T(1024)} negate(%x), metadata={op_name="Neg"}
    ROOT %t = (s32[], f32[1024]{0:T(1024)}) tuple(%i, %y)
"""
CONDITION = """%condition:
    %n = s32[] constant(7)
    %p = (s32[], f32[1024]{0:T(1024)}) parameter(0)
    %i = s32[] get-tuple-element(%p), index=0
    ROOT %less = pred[] compare(%i, %n), direction=LT
"""


def loop(said: str = "") -> str:
    return f"""
        %a = (s32[], f32[1024]{{0:T(1024)}}) parameter(0)
        ROOT %w = (s32[], f32[1024]{{0:T(1024)}}) while(%a), condition=%condition, body=%body{said},
            metadata={{op_name="LazyAdam/Unique"}}
    """.replace(",\n            ", ", ")


def test_a_loop_costs_its_body_times_its_trips():
    said = ', backend_config={"known_trip_count":{"n":"10"}}'
    assert bytes_of(loop(said), BODY, CONDITION) == [10 * 8192]
    assert bytes_of(loop(), BODY, CONDITION) == [7 * 8192]  # as the condition has it
    unknown = CONDITION.replace("constant(7)", "get-tuple-element(%p), index=0")
    assert bytes_of(loop(), BODY, unknown) == [8192]
    assert program(loop(said), BODY, CONDITION).loops() == [(10, "LazyAdam/Unique")]
    assert program(loop(), BODY, CONDITION).loops() == [(7, "LazyAdam/Unique")]


def test_a_loop_in_a_loop():
    outer = "%outer:" + loop()
    entry = loop(', backend_config={"known_trip_count":{"n":"3"}}').replace("%body", "%outer")
    made = program(entry, BODY, CONDITION, outer)
    assert [move.bytes for move in made.moves()] == [3 * 7 * 8192]
    assert [trips for trips, _ in made.loops()] == [3, 21]


def test_a_call_costs_what_is_called_and_a_conditional_its_dearest_branch():
    arguments = "(s32[], f32[1024]{0:T(1024)})"
    once = f"%a = {arguments} parameter(0)\n ROOT %c = {arguments} call(%a), to_apply=%body"
    assert bytes_of(once, BODY) == [8192]
    cheap = "%cheap:\n %x = f32[128]{0:T(128)} parameter(0)\n ROOT %y = f32[128]{0:T(128)} negate(%x)"
    for branches in ("branch_computations={%cheap, %body}", "true_computation=%body, false_computation=%cheap"):
        entry = f"%a = {arguments} parameter(0)\n ROOT %c = {arguments} conditional(%i, %a, %a), {branches}"
        assert bytes_of(entry, BODY, cheap) == [8192]


# Between chips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("replica_groups={{0,1,2,3}}", 4),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=mesh['axis_0'=4] {'axis_0'}", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a', 'b'}", 8),
        ("replica_groups={}", 16),  # all of them
    ],
)
def test_an_all_reduce_sends_nearly_twice_what_it_reduces(groups, chips):
    """Wherever it lies: reduce-scatter, then all-gather, each of which sends all but a chip's own share."""
    both = "(f32[1024]{0:T(1024)S(1)}, f32[8,128]{1,0:T(8,128)})"
    [move] = program(f"""
        %a = f32[1024]{{0:T(1024)S(1)}} parameter(0)
        %b = f32[8,128]{{1,0:T(8,128)}} parameter(1)
        ROOT %r = {both} all-reduce(%a, %b), channel_id=1, {groups}, to_apply=%add
    """, header="HloModule step, num_partitions=16").moves()  # fmt: skip
    assert move.between_chips and move.bytes == pytest.approx(2 * (chips - 1) / chips * 8192)
    assert move.what == "all-reduce of f32[1,024], f32[8,128]"


@pytest.mark.parametrize(
    ("instruction", "share"),
    [
        ("f32[4096]{0:T(1024)} all-gather(%a)", 0.75 * 16_384),
        ("(f32[1024]{0:T(1024)}, f32[4096]{0:T(1024)}) all-gather-start(%a)", 0.75 * 16_384),
        ("f32[1024]{0:T(1024)} all-reduce-start(%a)", 1.5 * 4_096),
        ("f32[256]{0:T(256)} reduce-scatter(%a)", 0.75 * 4_096),
        ("f32[1024]{0:T(1024)} all-to-all(%a)", 0.75 * 4_096),
        (
            "(f32[1024]{0:T(1024)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a)",
            4_096,
        ),
    ],
)
def test_what_other_collectives_send(instruction, share):
    done = instruction.split(" ")[-1].split("(")[0].replace("-start", "-done")
    last = f"%d = f32[1024]{{0:T(1024)}} {done}(%c)" if "-done" in done else ""
    entry = f"%a = f32[1024]{{0:T(1024)}} parameter(0)\n %c = {instruction}, replica_groups={{{{0,1,2,3}}}}\n {last}"
    [move] = program(entry).moves()
    assert move.between_chips and move.bytes == pytest.approx(share)


# Programs ----------------------------------------------------------------------------------------------


def test_parameters_stand_in_their_order_and_aliases_name_outputs_and_parameters():
    made = program(
        """
        %b = f32[7]{0:T(128)} parameter(1)
        %k = f32[1,2]{1,0:T(1,128)} parameter(10)
        %a = f32[5]{0:T(128)} parameter(0)
        ROOT %t = (f32[7]{0:T(128)}, f32[5]{0:T(128)}) tuple(%b, %a)
        """,
        header="HloModule step, input_output_alias={ {0}: (1, {}, may-alias), {12}: (10, {}, must-alias) }",
    )
    assert list(map(str, made.parameters())) == ["f32[5]", "f32[7]", "f32[1,2]"]
    assert made.aliases() == {0: 1, 12: 10}
    single = program(
        "ROOT %a = f32[5]{0} parameter(0)", header="HloModule s, input_output_alias={ {}: (3, {}, may-alias) }"
    )
    assert single.aliases() == {0: 3}


def test_names_without_a_percent_sign_are_read_too():
    assert bytes_of("a = f32[128]{0} parameter(0)\n b = f32[128]{0} negate(a)\n ROOT c = f32[128]{0} add(a, b)") == [
        1024,
        1536,
    ]


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY in this text: expected optimized HLO, found 'module @step"):
        Program("module @step attributes {}")


# A real one --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step() -> Program:
    """A training step for a v5e, by libtpu 0.0.52: 8,192 rows out of a table [1,000,000, 16], a dense layer of 256.

    Its optimizer is a row-wise Adagrad with accumulators [1,000,000, 1]. Sources, schedules and settings are cut out.
    """
    return Program((Path(__file__).parent / "data" / "v5e_step.hlo").read_text())


def test_arguments_take_what_the_compiler_says(step):
    sizes = [one.stored for one in step.parameters()]
    # ids, labels, table as 16 columns of 1,000,064, kernels [16, 256] and [256, 1], accumulators as one column
    assert sizes == [32_768, 32_768, 64_004_096, 16_384, 1_024, 4_000_256]
    assert sum(sizes) == 68_087_296  # its argument_size_in_bytes
    assert [compact(one.dims, one.dtype) for one in step.parameters()] == sizes
    assert step.aliases() == {1: 2, 2: 3, 3: 4, 4: 5}
    assert sum(sizes[parameter] for parameter in step.aliases().values()) == 68_021_760  # its alias_size_in_bytes


def test_a_real_step_by_hand(step):
    moves, table, rows = step.moves(), 64_004_096, 1_000_000 * 128 * 4
    a_row = 8_192 * 16 * 4 * table / 64_000_000  # of all that are looked up, out of a table of columns
    once = [32_768] * 3 + [16_384] * 2 + [1_024] * 2  # ids twice and labels; kernels to the chip, and back
    once += [4_000_256] * 2  # the accumulators likewise
    scalars = [move.bytes for move in moves if move.bytes < 4_096 and move.bytes != 1_024]
    assert sorted(move.bytes for move in moves if move.bytes not in scalars) == pytest.approx(sorted([
        *once, a_row,
        32_002_048, 32_002_048,  # the table goes to the chip in two halves,
        rows,  # from there into rows of 128 lanes,
        2 * 8_192 * 128 * 4,  # of which the scatter reads and writes some, with updates from the chip,
        rows + table,  # and all of it back into columns
    ]))  # fmt: skip
    assert sum(scalars) < 10_000
    largest = max(moves, key=lambda move: move.bytes)
    assert largest.what == "copy of f32[1,000,000,16] into another layout, 512 MB as stored for 64 MB of numbers"
    assert {move.operation for move in moves if "gather" in move.what} == {"Gather"}
    assert step.loops() == []
