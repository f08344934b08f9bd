"""`strassen-tile plan`: its decisions, and that they are `convert`'s. Nothing here is timed."""

import json

import pytest
import torch
from flat_machine import FLAT
from torch import nn

from strassen_tile import STLConfig, cost
from strassen_tile.cli import main
from strassen_tile.convert import convert
from strassen_tile.errors import ConfigError, ConversionError
from strassen_tile.experiments import loading, planning
from strassen_tile.report import plan as plan_report


@pytest.fixture(autouse=True)
def _machine(tmp_path, monkeypatch) -> None:
    """No machine is measured."""
    monkeypatch.setattr("strassen_tile.experiments.measuring.machine", lambda *_, **__: FLAT)


def test_decisions_are_those_of_flops_counted_by_hand() -> None:
    """A row takes 2KM dense; STL 2KM·24/64, and to encode and decode 2·24 for each of its K + M numbers."""
    by_hand = {
        "0": (2 * 64 * 64) / (2 * 64 * 64 * 24 / 64 + 48 * (64 + 64)),  # 0.89
        "2": (2 * 64 * 1024) / (2 * 64 * 1024 * 24 / 64 + 48 * (64 + 1024)),  # 1.29
        "4": (2 * 1024 * 1024) / (2 * 1024 * 1024 * 24 / 64 + 48 * (1024 + 1024)),  # 2.37
    }
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Flatten()
    )
    records = planning.plan(model, STLConfig(rank=24), FLAT, rows=512, min_speedup=1.5)
    assert {record["layer"]: record["predicted_speedup"] for record in records} == pytest.approx(by_hand)
    assert [record["decision"] for record in records] == ["leave", "leave", "convert"]
    assert [record["reason"] for record in records] == [
        "predicted 0.89× is below 1.5×", "predicted 1.29× is below 1.5×", "predicted 2.37×"
    ]  # fmt: skip
    slow = cost.Machine(**{**vars(FLAT), "copy": 1e6})  # bytes a second: encoding takes far longer than any product
    assert {r["decision"] for r in planning.plan(model, STLConfig(rank=24), slow, rows=512)} == {"leave"}


def test_the_figures_of_the_documentation() -> None:
    """On a machine where FLOPs alone count: 1/(24/64 + 24/K + 24/M)."""
    layers = planning.layers_of_shapes([(512, 4096, 4096), (512, 256, 768), (512, 128, 128)])
    records = planning.decide(layers, STLConfig(rank=24), FLAT, min_speedup=1.9)
    assert [round(record["predicted_speedup"], 2) for record in records] == [2.59, 2.0, 1.33]
    assert [record["decision"] for record in records] == ["convert", "convert", "leave"]
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4096, 4, 4096, batch_first=True), 1)
    attention, *linear = planning.plan(model, STLConfig(rank=24), FLAT, rows=512)
    assert attention["decision"] == "leave"
    assert "NonDynamically" in attention["reason"]
    assert [record["decision"] for record in linear] == ["convert", "convert"]


def test_what_plan_lists_is_what_convert_decides() -> None:
    """Layers recommended that convert refuses: the model itself, and those of a part that is causal."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2)
    config, x = STLConfig(), torch.randn(2, 9, 64)
    planned = planning.layers_of(model, config, rows=64)
    done = convert(model, config, example_inputs=x)
    assert {layer.name for layer in planned if layer.skipped is None} == set(done.converted)
    assert {layer.name: layer.skipped for layer in planned if layer.skipped} == {
        name: done.skipped[name] for name in done.skipped if name.endswith("out_proj")
    }
    for refused in (lambda m: planning.layers_of(m, config, rows=64), lambda m: convert(m, config)):
        with pytest.raises(ConversionError, match=r"STLLinear\.from_linear"):
            refused(nn.Linear(8, 8))


def test_what_example_inputs_show_is_planned_with() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    (record, *_) = planning.plan(model, STLConfig(), FLAT, rows=64, example_inputs=torch.randn(16, 8))
    assert (record["n"], record["decision"]) == (16, "leave")
    assert "2-D input" in record["reason"]
    (record, *_) = planning.plan(model, STLConfig(), FLAT, rows=64, example_inputs=torch.randn(2, 16, 8))
    assert record["n"] == 32
    assert "mixing its rows would" in record["reason"]  # row by row, nothing shows that they may meet
    config = STLConfig(mixing="none")
    (record, *_) = planning.plan(model, config, FLAT, rows=64, example_inputs=torch.randn(2, 16, 8))
    assert (record["n"], record["reason"].startswith("predicted")) == (32, True)


def test_a_causal_model_is_not_planned_to_see_the_future(tmp_path, capsys) -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 128, batch_first=True), 2)
    with pytest.raises(ConfigError, match="--mixing none or --mixing causal"):
        planning.layers_of(model, STLConfig(), rows=64)
    with pytest.raises(ConversionError):
        convert(model, STLConfig())
    for mixing in ("none", "causal"):
        assert planning.layers_of(model, STLConfig(mixing=mixing), rows=64)
    assert planning.layers_of(model, STLConfig(tile=(1, 4, 4)), rows=64)
    assert main(["plan", "torch.nn:Transformer", "--out", str(tmp_path / "out")]) == 1
    assert "a token would see later ones" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_equal_layers_share_a_line(tmp_path) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    records = planning.plan(nn.TransformerEncoder(layer, 6), STLConfig(), FLAT, rows=64)
    assert len(records) == 18
    lines = plan_report.grouped(records)
    assert [(line["layer"], line["count"]) for line in lines] == [
        ("layers.*.self_attn.out_proj", 6), ("layers.*.linear1", 6), ("layers.*.linear2", 6)
    ]  # fmt: skip
    odd = [{**records[1], "reason": "another"}, *records[2:]]
    named = [(line["layer"], line["count"]) for line in plan_report.grouped(odd)]
    assert named[0] == ("layers.0.linear1", 1)
    assert ("layers.*.linear1", 5) in named
    dense, _ = plan_report.totals(records)
    assert dense == pytest.approx(sum(record["predicted_dense_s"] for record in records))
    page = plan_report.write_report(tmp_path, records, "Plan", []).read_text()
    assert page.count("<td>layers.*.linear1</td>") + page.count(">layers.*.linear1<") >= 1
    assert "layers.3.linear1" not in page
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 18


def test_plan_command(tmp_path, capsys) -> None:
    assert main(["plan", "torch.nn:Transformer", "--rows", "256", "--mixing", "none", "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "rows.json").read_text())
    assert {"layer", "shape", "decision", "reason", "predicted_speedup"} <= set(records[0])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "encoder.layers.*.linear1" in (tmp_path / "report.html").read_text()
    assert {record["rank"] for record in records} == {6}  # of a tile of one row
    assert main(["plan", "--shapes", "1024x1024x1024", "--out", str(tmp_path)]) == 0
    assert main(["plan", "no_such_module:thing", "--out", str(tmp_path)]) == 1
    assert main(["plan", "--out", str(tmp_path)]) == 1
    assert "cannot make a model of" in capsys.readouterr().err


def test_plan_for_a_model_with_arguments_and_for_a_folder(tmp_path, capsys) -> None:
    """A vision transformer by its arguments; a language model's folder by its config alone, weights unread."""
    arguments = '{"name": "t2t_vit_wide", "image_size": 8, "in_channels": 1}'
    command = ["plan", "strassen_tile.models:t2t_vit", "--rows", "64", "--out", str(tmp_path / "out")]
    assert main([*command, "--arguments", arguments]) == 0
    records = {row["layer"]: row for row in json.loads((tmp_path / "out" / "rows.json").read_text())}
    assert records["blocks.0.attn.qkv"]["shape"] == "64x768x2304"
    assert main([*command, "--arguments", '{"name": "t2t_vit_0"}']) == 1
    assert "no such size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--arguments", "[1]"])
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50).save_pretrained(tmp_path / "llama")
    assert main(["plan", str(tmp_path / "llama"), "--mixing", "none", "--out", str(tmp_path / "out")]) == 0
    records = {row["layer"]: row for row in json.loads((tmp_path / "out" / "rows.json").read_text())}
    assert records["layers.0.mlp.up_proj"]["shape"] == "4096x32x64"
    assert records["layers.0.mlp.up_proj"]["tile"] == "1x4x4"
    assert main(["plan", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "cannot make a model" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["list", "weight", "causal", "sequence first"])
def test_with_inputs_plan_and_convert_decide_alike(how) -> None:
    """What shows only in runs: a layer called past its name, weights that are read, rows that must not mix."""
    x = torch.randn(2, 6, 8)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.steps = [self.a]

        def forward(self, x):
            y = self.steps[0](x) if how == "list" else self.a(x)
            y = y * self.a.weight.norm() if how == "weight" else y
            y = y.transpose(0, 1) if how == "sequence first" else y
            scores = y @ y.mT
            mask = torch.ones_like(scores).triu(1).bool() if how == "causal" else torch.zeros_like(scores).bool()
            y = self.b(scores.masked_fill(mask, -torch.inf).softmax(-1) @ y).relu()
            y = y.transpose(0, 1) if how == "sequence first" else y
            return self.c(y.mean(1)).relu()

    for config in (STLConfig(), STLConfig(mixing="none")):
        model = Model()
        records = planning.plan(model, config, FLAT, rows=64, min_speedup=0.0, example_inputs=x)
        planned = {record["layer"] for record in records if record["decision"] == "convert"}
        reasons = {record["layer"]: record["reason"] for record in records if record["decision"] == "leave"}
        try:
            done = convert(model, config, example_inputs=x)
            assert (planned, reasons) == (set(done.converted), done.skipped)
        except ConversionError as error:
            assert not planned
            assert all(reason in str(error) for reason in reasons.values())
            assert set(reasons) == {"a", "b", "c"}


def test_a_layer_called_twice_costs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x, y):
            return self.a(x).relu(), self.a(y).relu()

    config, inputs = STLConfig(mixing="none"), (torch.randn(2, 6, 8), torch.randn(5, 8))
    (record,) = planning.plan(Twice(), config, FLAT, rows=64, example_inputs=inputs)
    assert (record["n"], record["calls"]) == (12, 2)
    assert record["predicted_dense_s"] == pytest.approx(2 * 8 * 8 * (12 + 5) / 1e11)


def test_inputs_are_what_models_take() -> None:
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.types = nn.Embedding(50, 4, dtype=torch.float64), nn.Embedding(2, 4)

    shapes = {
        "input_ids": [2, 7],
        "token_type_ids": [2, 7],
        "position_ids": [2, 7],
        "attention_mask": [2, 7],
        "scale": [3],
    }
    inputs = loading.example_inputs_of(Text(), shapes)
    assert {name: tuple(t.shape) for name, t in inputs.items()} == {
        name: tuple(shape) for name, shape in shapes.items()
    }
    assert inputs["input_ids"].dtype is torch.long
    assert inputs["input_ids"].max() > 2
    assert inputs["input_ids"].max() < 50
    assert inputs["token_type_ids"].unique().tolist() == [0]
    assert inputs["position_ids"][1].tolist() == list(range(7))
    assert inputs["attention_mask"].all()
    assert inputs["scale"].dtype is torch.float64
    assert loading.example_inputs_of(Text(), [2, 3, 8, 8]).shape == (2, 3, 8, 8)
    for wrong in ([], {}, [2, 0], [2.5], {"x": 3}, {"x": [True]}, [[2, 3]], "dummy", [1 << 40]):
        with pytest.raises(ConfigError, match="dummy_inputs" if wrong == "dummy" else "shapes of positive sizes"):
            loading.example_inputs_of(Text(), wrong)


def test_plan_command_with_inputs(tmp_path, capsys) -> None:
    """Pixels of a vision transformer; a causal language model's folder, whose rows are seen not to meet."""
    out = ["--out", str(tmp_path / "out")]
    arguments = '{"name": "t2t_vit_nano", "image_size": 8, "in_channels": 1, "num_classes": 10}'
    command = ["plan", "strassen_tile.models:t2t_vit", "--arguments", arguments, *out]
    assert main([*command, "--inputs", "[2, 1, 8, 8]"]) == 0
    records = {row["layer"]: row for row in json.loads((tmp_path / "out" / "rows.json").read_text())}
    assert records["head"]["reason"] == "a head: it makes the model's output"
    assert records["blocks.0.attn.qkv"]["shape"] == "32x256x768"
    assert "from runs on inputs of these shapes: (2, 1, 8, 8)" in " ".join(capsys.readouterr().out.split())
    for wrong, said in (
        ("[2, 1, 9, 9]", "expected (B, 1, 8, 8)"),
        ('{"words": [2]}', "does not run on these inputs"),
        ("dummy", "no dummy_inputs"),
        ("[2.5]", "shapes"),
    ):
        assert main([*command, "--inputs", wrong]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
    for wrong in ("null", "3", "{"):
        with pytest.raises(SystemExit):
            main([*command, "--inputs", wrong])
    assert main(["plan", "--shapes", "8x8x8", "--inputs", "[2]", *out]) == 1
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50).save_pretrained(tmp_path / "llama")
    assert main(["plan", str(tmp_path / "llama"), "--inputs", '{"input_ids": [2, 9]}', *out]) == 0
    records = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert {(row["n"], row["decision"]) for row in records} == {(18, "leave")}
    assert all("input_ids[0, " in row["reason"] for row in records)


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--shapes", ""], "NxKxM"),
        (["--shapes", "9" * 400 + "x1x1"], "NxKxM"),
        (["--shapes", "64x64x64", "--min-speedup", "nan"], "--min-speedup a number"),
        (["--shapes", "64x64x64", "--rows", "0"], "--rows must be positive"),
        (["torch.nn:Identity"], "no linear layers"),
        (["torch.nn:Linear", "--arguments", '{"in_features": -5, "out_features": 4}'], "cannot make a model"),
        (["torch.nn:Linear", "--arguments", '{"in_features": 5, "out_features": 4}'], "STLLinear.from_linear"),
        (["--shapes", "64x64x64", "--out", "FILE/out"], "FILE"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(arguments, said, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--out", "out", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_inputs_are_within_a_models_vocabulary() -> None:
    """Position tables are larger than small vocabularies; PyTorch's masks say what is hidden."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.positions, self.kinds = nn.Embedding(9, 8), nn.Embedding(512, 8), nn.Embedding(1, 8)

    made = loading.example_inputs_of(
        Words(), {"idx": [2, 64], "token_type_ids": [2, 64], "src_key_padding_mask": [2, 64], "attention_mask": [2, 64]}
    )
    assert made["idx"].max() == 8 and not made["token_type_ids"].any()
    assert made["src_key_padding_mask"].dtype == torch.bool and not made["src_key_padding_mask"].any()
    assert made["attention_mask"].all()


def test_a_layer_that_is_not_called_takes_no_time() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.a(x) + 0

    rows = planning.plan(Unused(), STLConfig(mixing="none"), FLAT, rows=4096, example_inputs=torch.randn(2, 16, 64))
    by_name = {row["layer"]: row for row in rows}
    assert by_name["a"]["n"] == 32 and by_name["a"]["predicted_dense_s"] > 0
    assert by_name["unused"]["n"] == 0 and by_name["unused"]["predicted_dense_s"] == 0
    assert by_name["unused"]["decision"] == "leave"
