"""The names that outside users and their scripts hold to, and the files they have: all but these may move."""

import inspect
from pathlib import Path

import pytest
import torch

import strassen_tile as st
from strassen_tile.records import read_rows
from strassen_tile.report import amm, bench, compare, finetune, pretrain, pretrain_runs

ROOT = Path(__file__).parents[1]

# Callable → its parameters, in the order and with the kind (positional or keyword) that callers use.
SIGNATURES = {
    st.Basis: "encoder, weight_encoder, decoder, name",
    st.bases.naive: "p, q, s",
    st.bases.strassen: "levels",
    st.bases.approximate: "tile, rank",
    st.bases.random: "tile, rank, seed",
    st.bases.load: "path",
    st.stl_matmul: "x, w, basis, *, backend",
    st.stl_linear: "x, encoded_weight, encoder, decoder, bias, *, out_features, backend",
    st.STLConfig: "tile, rank, basis, mixing, encoder_scope",
    st.STLLinear: "in_features, out_features, bias, *, config, device, dtype",
    st.STLLinear.from_linear: "linear, config, inputs",
    st.convert: "model, config, *, example_inputs, filter_fn",
    st.param_groups: "model, lr, weight_decay",
    st.cost.linear: "n, k, m, tile, rank",
    st.models.t2t_vit: "name, *, num_classes, image_size",
    st.check_mixing: "model, example_inputs",
    st.quantize_fp8: "model",
    st.fuse_mlps: "model",
    st.padding: "model, mask",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_callers_of_today_can_still_call(function: object) -> None:
    positional, _, keywords = SIGNATURES[function].partition("*, ")
    found = inspect.signature(function).parameters
    names = [name for name in positional.split(", ") if name]
    assert [name.rstrip(",") for name in names] == list(found)[: len(names)]
    assert {name for name in keywords.split(", ") if name} <= set(found)
    wanted = {*names, *keywords.split(", ")}
    more = [p.name for p in found.values() if p.name not in wanted and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert all(found[name].default is not inspect.Parameter.empty for name in more), "a new parameter needs a default"


def test_attributes() -> None:
    basis = st.bases.strassen()
    attributes = {"tile", "rank", "error", "kappa", "is_exact", "flop_ratio", "param_ratio", "kron", "refit_decoder"}
    attributes |= {"quantize", "save", "load"}
    assert not [name for name in attributes if not hasattr(basis, name)]
    conversion = st.convert(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)),
                            st.STLConfig(mixing="none"), filter_fn=lambda module, name: name == "0")  # fmt: skip
    assert list(conversion.converted) == ["0"] and list(conversion.skipped) == ["2"]
    conversion.undo()


def test_state_dicts_keep_their_names_and_shapes() -> None:
    layer = st.STLLinear(10, 7, config=st.STLConfig(tile=(4, 2, 3), rank=5))
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "encoder": (5, 4, 2),
        "encoded_weight": (5, 5, 3),
        "decoder": (5, 4, 3),
        "bias": (7,),
        "meaning": (0, 0, 0, 4, 2, 3, 10, 7),
    }
    per_tile = st.STLLinear(10, 7, False, config=st.STLConfig(tile=(4, 2, 3), rank=5, encoder_scope="tile"))
    assert {name: tuple(value.shape) for name, value in per_tile.named_parameters()} == {
        "encoder": (5, 5, 4, 2),
        "encoded_weight": (5, 5, 3),
        "decoder": (3, 5, 4, 3),
    }
    names = {name.rpartition(".")[0] for name in st.STLMLP(8, 16, gated=True).state_dict()}
    assert names == {"gate", "up", "down"}


PUBLISHED = [  # those of the digits' studies are alike
    pytest.param(path, id=path.parent.name, marks=[pytest.mark.slow] if path.parent.name.startswith("digits-") else [])
    for path in sorted(ROOT.glob("results/*/rows.json"))
]


@pytest.mark.parametrize("path", PUBLISHED)
def test_rows_of_comparisons_still_make_a_report(path: Path, tmp_path: Path) -> None:
    rows = read_rows(path)
    of_text = any("bits" in row for row in rows)
    if "basis" in rows[0]:  # of products, not of networks
        assert amm.write_report(tmp_path, rows, "as they are").exists()
        assert (tmp_path / "rows.json").read_bytes() == path.read_bytes()
        return
    report = finetune if "calibration" in rows[0] else pretrain if of_text else compare
    page = report.write_report(tmp_path, rows, "as they are").read_text(encoding="utf-8")
    assert not [method for method in {str(row["method"]) for row in rows} if f">{method}<" not in page]
    if report is finetune:
        summary = finetune.summarise(rows)
        encoder = all(record["perplexity"] is None for record in summary)
        best = (
            f"{max(record['cosine'] for record in summary):.3f}"
            if encoder
            else f"{min(record['perplexity'] for record in summary):.2f}"
        )
    elif of_text:
        best = f"{min(record['bits'] for record in pretrain_runs.summarise(rows)):.3f}"
    else:
        best = f"{max(record['top1'] for record in compare.summarise(rows)):.2f}"
    assert best in page
    assert (tmp_path / "rows.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/results/cpu-*cores.json")), ids=lambda path: path.stem)
def test_rows_of_benchmarks_still_make_a_report(path: Path, tmp_path: Path) -> None:
    rows = read_rows(path)
    assert bench.write_report(tmp_path, rows, "as they are").exists()
    assert read_rows(tmp_path / "rows.json") == rows
