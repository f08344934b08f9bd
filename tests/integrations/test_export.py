"""If these fail, a converted encoder cannot be served where this package, or PyTorch, is not."""

import subprocess
import sys

import pytest
import torch

import strassen_tile as st
from strassen_tile.errors import ConfigError, ConversionError

hf = pytest.importorskip("transformers")
from tiny_transformers import IDS, MASK, PIXELS, TEXT, built  # noqa: E402

BATCH, LENGTH = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=32)
SHAPES = {"input_ids": {0: BATCH, 1: LENGTH}, "attention_mask": {0: BATCH, 1: LENGTH}}
OTHERS = [(5, 23), (1, 3), (2, 16), (1, 32)]


class Encoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


@pytest.fixture(scope="module")
def encoder():
    config = built("bert").config
    config.num_hidden_layers = 1  # to trace takes seconds a layer
    model = hf.BertModel(config, add_pooling_layer=False).eval()
    st.convert(model, st.STLConfig(rank=20), example_inputs=TEXT)
    return Encoder(model).eval()


def exported(encoder, runtime):
    """A program of standard operators that takes other sizes."""
    program = st.export(encoder, (), TEXT, dynamic_shapes=SHAPES, runtime=runtime)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not any("strassen" in target for target in targets)
    module = program.module()
    with torch.no_grad():
        for size in OTHERS:
            inputs = batch(*size)
            torch.testing.assert_close(module(**inputs), encoder(**inputs), rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match="pad on the right"):
            module(input_ids=IDS, attention_mask=MASK.flip(1))
    return program


def batch(rows, length):
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, 60, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def test_it_runs_without_this_package(encoder, tmp_path):
    torch.export.save(exported(encoder, "pytorch"), tmp_path / "model.pt2")
    inputs = batch(3, 9)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = f"""
import sys, torch
sys.modules["strassen_tile"] = sys.modules["transformers"] = None
folder = {str(tmp_path)!r}
torch.save(torch.export.load(folder + "/model.pt2").module()(**torch.load(folder + "/inputs.pt")), folder + "/outputs.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), encoder(**inputs), rtol=1e-5, atol=1e-5)


def test_onnx_of_any_batch_and_length(encoder, tmp_path):
    program = exported(encoder, "onnxruntime")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    for size in OTHERS:
        inputs = batch(*size)
        (found,) = session.run(None, {name: inputs[name].numpy() for name in names})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), encoder(**inputs), rtol=1e-4, atol=1e-5)


def test_a_reloaded_model_is_exported_and_saved(encoder, tmp_path):
    encoder.model.save_pretrained(tmp_path)
    again = hf.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    torch.export.save(st.export(again, (), TEXT), tmp_path / "model.pt2")
    with torch.no_grad():
        found = torch.export.load(tmp_path / "model.pt2").module()(**TEXT).last_hidden_state
        torch.testing.assert_close(found, encoder(**TEXT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [pytest.param("Dinov2Model", marks=pytest.mark.slow), pytest.param("ModernBertModel", marks=pytest.mark.slow)],
)
def test_models_whose_graphs_differ_from_what_runs(kind, tmp_path):
    """DINOv2 hands a mask down only while it is traced; ModernBERT's views ask for the strides that the layer gives."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "Dinov2Model":
        model, inputs = hf.Dinov2Model(hf.Dinov2Config(**sizes, image_size=16, patch_size=4, mlp_ratio=2)), dict(PIXELS)
        shapes, others = {"pixel_values": {0: BATCH}}, [{"pixel_values": PIXELS["pixel_values"][:1]}]
    else:
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
        config = hf.ModernBertConfig(
            **sizes, **special, vocab_size=60, intermediate_size=48, max_position_embeddings=64
        )
        model, inputs = hf.ModernBertModel(config), TEXT
        shapes, others = SHAPES, [batch(1, 11), batch(3, 12)]
    st.convert(model.eval(), st.STLConfig(rank=20), example_inputs=inputs)
    program = st.export(model, (), inputs, dynamic_shapes=shapes).module()
    with torch.no_grad():
        for given in others:
            expected = model(**given).last_hidden_state
            torch.testing.assert_close(program(**given).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_says_so(encoder):
    with pytest.raises(ConfigError, match="one of pytorch, onnxruntime; got 'onnx'"):
        st.export(encoder, (), TEXT, runtime="onnx")
    with pytest.raises(ConversionError, match="training mode"):
        st.export(encoder.train(), (), TEXT)
    done = st.quantize_fp8(encoder.eval())
    with pytest.raises(ConversionError, match="in fp8"):
        st.export(encoder, (), TEXT)
    done.undo()
