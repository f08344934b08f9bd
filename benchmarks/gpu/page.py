"""The page of `make gpu-check`: checks, speed, blocks, the split of a pass, fp8, block sizes; a plot where matplotlib is."""

from strassen_tile.files import write_bytes
from strassen_tile.records import environment_of
from strassen_tile.report.bench import figure, page_columns
from strassen_tile.report.figures import png
from strassen_tile.report.page import Section, html_table, write_page
from strassen_tile.report.table import Column, field, percent, ratio, seconds


def shape(row):
    return row.get("shape") or f"{row['n']}×{row['k']}×{row['m']}"


BLOCKS = (
    Column("Block", "block", "left"),
    Column("Input", shape, "left"),
    Column("r", "rank"),
    Column("Dense", field("dense_s", seconds)),
    Column("Dense is", "dense", "left"),
    Column("STL", field("median_s", seconds)),
    Column("Speed-up", field("speedup", ratio)),
)
SPLIT = (
    Column("N×K×M", shape, "left"),
    Column("r", "rank"),
    *(
        Column(name.capitalize(), field(f"{name}_s", seconds))
        for name in ("dense", "encode", "products", "decode", "whole")
    ),
    Column("As a graph", field("whole_graph_s", seconds)),
    Column("Row-major X̂", field("products_of_row_major_s", seconds)),
    Column("Encode of copy", field("encode_of_copy", percent)),
    Column("Decode of copy", field("decode_of_copy", percent)),
    Column("Products of dense rate", field("products_of_dense_rate", percent)),
)
EIGHT_BITS = (
    Column("N×K×M", shape, "left"),
    Column("r", "rank"),
    Column("Dense bf16", field("dense_bf16_s", seconds)),
    Column("Dense fp8", field("dense_fp8_s", seconds)),
    Column("STL fp8", field("stl_fp8_s", seconds)),
    Column("Speed-up", field("speedup_of_dense_fp8", ratio)),
    Column("In graphs", field("speedup_of_dense_fp8_in_graphs", ratio)),
)
TUNED = (
    Column("Kernel", "kernel", "left"),
    Column("Tile rows × tiles × warps", "choice"),
    Column("ms", "ms"),
    Column("Guessed, ms", "guess_ms"),
)


def write(out, checks, parts, rows):
    """report.html of whatever there is, and plot.png."""
    wrong = [row["check"] for row in checks if not row["ok"]]
    said = (f"{len(checks) - len(wrong)} of {len(checks)} checks passed.", *(f"Failed: {name}" for name in wrong))
    sections = [Section("Checks against float64", said)]
    bench = [row for row in rows if "block" not in row]
    tables = (
        ("Products, in alternating pairs with dense", page_columns(), bench),
        ("Blocks", BLOCKS, [row for row in rows if "block" in row]),
        ("Where the time goes", SPLIT, [row for row in parts if row["part"] == "split"]),
        ("fp8", EIGHT_BITS, [row for row in parts if row["part"] == "fp8"]),
        ("Block sizes", TUNED, [row for row in parts if row["part"] == "tuned"]),
    )
    sections += [Section(title, (), table=html_table(columns, found)) for title, columns, found in tables if found]
    try:
        drawn = figure(bench) if bench else None
    except ModuleNotFoundError as error:
        print(f"no plot: {error}")
        drawn = None
    if drawn is not None:
        plot = png(drawn)
        write_bytes(out / "plot.png", plot)
        sections.append(Section("Against size", figure=plot, caption="Dashed: the limit. Shaded: 20 to 80 %."))
    write_page(out / "report.html", "GPU check", sections, environment_of([*rows, *parts, *checks]))
