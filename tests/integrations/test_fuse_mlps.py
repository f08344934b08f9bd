"""fuse_mlps: a model computes, learns, saves and masks as before; blocks that would not are left, each with its reason."""

import copy
import importlib
import pickle
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import strassen_tile as stl
import strassen_tile.nn.mlp as mlp_module
from strassen_tile import Roles, STLConfig, STLLinear, convert, fuse_mlps
from strassen_tile.errors import ConversionError
from strassen_tile.integrations import mlps

CONFIG = STLConfig(tile=(4, 2, 3), rank=7)
K, HIDDEN = 10, 14


@pytest.fixture
def fusions(monkeypatch):
    """Grows by one each time an MLP runs as one operator."""
    done, original = [], mlp_module._fused
    monkeypatch.setattr(mlp_module, "_fused", lambda *a: done.append(1) or original(*a))
    return done


def to_stl(model, config=CONFIG):
    """Every linear layer of a small model replaced, wherever it is."""
    for owner in list(model.modules()):
        for name, child in list(owner._modules.items()):
            if type(child) is nn.Linear:
                owner._modules[name] = STLLinear.from_linear(child, config)
    return model


class Block(nn.Module):
    """x + fc2(gelu(fc1(x))), or what a derived class makes of it; of no known class."""

    def __init__(self, bias=True):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(K, HIDDEN, bias), nn.GELU(), nn.Linear(HIDDEN, K, bias)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


ROLES = Roles(up="fc1", down="fc2", activation="act")


class Model(nn.Module):
    """A sequential MLP between two others, attention in the middle, and a mask."""

    def __init__(self, block=None):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(K, HIDDEN), nn.SiLU(), nn.Dropout(0), nn.Linear(HIDDEN, K), nn.Identity())
        self.block = Block() if block is None else block

    def forward(self, x, attention_mask=None):
        y = self.first(x)
        scores = y @ y.mT
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
        return self.block(y + scores.softmax(-1) @ y)


def model_of(block=None):
    return to_stl(Model(block).double().eval())


X = torch.randn(3, 7, K, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# --- known classes


ACTS = ["relu", "gelu", "gelu_pytorch_tanh", "silu", "gelu_python", "swish"]


@pytest.mark.parametrize("name", mlps.BLOCKS)
def test_every_class_of_the_table_is_one(name, fusions):
    """With the activations that its configs name. A wrong row would be found by the run before the replacement."""
    path, _, kind = name.rpartition(".")
    build = getattr(importlib.import_module(path), kind)
    for act in ACTS:
        config = SimpleNamespace(
            hidden_size=K, intermediate_size=HIDDEN, mlp_ratio=HIDDEN / K, mlp_bias=True, hidden_act=act,
            hidden_activation=act,
        )  # fmt: skip
        block = build(K, HIDDEN) if path.startswith("strassen_tile") else build(config)
        holder = to_stl(nn.ModuleDict({"mlp": block}).double())
        keys, layers = list(holder.state_dict()), {n: m for n, m in block.named_children() if type(m) is STLLinear}
        expected = block(X)
        fused = fuse_mlps(holder).fused["mlp"]
        assert holder["mlp"] is fused
        assert list(holder.state_dict()) == keys
        assert dict(fused.named_children()) == layers
        with torch.no_grad():
            torch.testing.assert_close(fused(X), expected)
    assert len(fusions) >= len(ACTS)


def tiny_llama():
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))
    return hf.LlamaForCausalLM(config), {"input_ids": ids}, STLConfig(rank=8, mixing="causal"), 2


def tiny_siglip():
    import transformers as hf

    config = hf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4,
    )  # fmt: skip
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (
        hf.SiglipVisionModel(config),
        {"pixel_values": pixels},
        STLConfig(rank=8),
        2,
    )  # that of the pooling is fed one row a sample and stays dense


def tiny_t2t():
    model = stl.models.t2t_vit("t2t_vit_nano", num_classes=5, image_size=8, in_channels=1)
    pixels = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, (pixels,), STLConfig(rank=8), None


def call(model, inputs):
    y = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return y if isinstance(y, torch.Tensor) else y[0]


@pytest.mark.parametrize("make", [tiny_llama, tiny_siglip, pytest.param(tiny_t2t, marks=pytest.mark.slow)])
def test_a_converted_model_computes_learns_and_saves_as_before(make, fusions):
    model, inputs, config, count = make()
    model.double().eval()
    stl.convert(model, config, example_inputs=inputs)
    before = {name: module for name, module in model.named_modules() if name.endswith("mlp")}
    plain, state = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        expected = call(model, inputs)

    report = fuse_mlps(model)
    if count is not None:
        assert len(report.fused) == count
    assert {name for name in before if name.startswith("blocks")} <= set(report.fused)
    assert list(model.state_dict()) == list(state)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(call(model, inputs), expected)
    assert len(fusions) >= len(report.fused)

    ran = len(fusions)
    for other in (model, plain):
        other.train()
        torch.manual_seed(0)  # of stochastic depth
        call(other, inputs).square().sum().backward()
    assert len(fusions) == ran, "with a gradient to come the layers run one by one"
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(call(plain.eval(), inputs), call(model.eval(), inputs))
    model.load_state_dict(state)
    report.undo()
    assert all(model.get_submodule(name) is block for name, block in before.items())
    torch.testing.assert_close(call(model, inputs), expected)


def test_a_sequential_of_two_layers_and_any_names(fusions):
    model = model_of()
    expected = model(X)
    report = fuse_mlps(model, roles={Block: ROLES})
    assert list(report.fused) == ["first", "block"]
    assert not report.skipped
    assert str(report).splitlines() == [
        "2 fused, 0 left as they are",
        "first  STLMLP, activation='silu', gated=False",
        "block  STLMLP, activation='gelu', gated=False",
    ]
    assert [name for name, _ in model.first.named_children()] == ["0", "3"]
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)
    assert len(fusions) >= 2


def test_activations_that_are_functions_are_known():
    for function, name in ((torch.relu, "relu"), (F.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu")):
        model = model_of()
        del model.block.act
        model.block.act = function
        assert fuse_mlps(model, roles={Block: ROLES}).fused["block"].roles.activation == name


def test_other_sequentials_are_not_spoken_of():
    parts = (nn.Linear(K, K), nn.Linear(K, K), nn.ReLU(), nn.LayerNorm(K))
    others = [
        nn.Sequential(*(parts[i] for i in order)) for order in ((0, 2), (0, 1), (0, 3, 1), (2, 0, 1), (0, 2, 1, 2))
    ]
    model = nn.ModuleList([to_stl(nn.Sequential(*others)), model_of()])
    report = fuse_mlps(model)
    assert (list(report.fused), report.skipped) == (["1.first"], {})


def test_a_block_under_two_names_stays_one():
    block = to_stl(nn.Sequential(nn.Linear(K, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, K)).double())
    model = nn.ModuleDict({"a": block, "b": nn.ModuleList([block])})
    report = fuse_mlps(model)
    assert model["a"] is model["b"][0] is report.fused["a"]
    report.undo()
    assert model["a"] is model["b"][0] is block
    report.undo()  # once is enough


# --- blocks that are left as they are


class Residual(Block):
    def forward(self, x):
        return x + super().forward(x)


class Flat(Block):
    """Rows of all samples in one tile."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)[None]).view_as(x)


class Hidden(Block):
    """Dropout that is no module."""

    def forward(self, x):
        return self.fc2(F.dropout(self.act(self.fc1(x)), 0.1, self.training))


class Pair(Block):
    def forward(self, x):
        return super().forward(x), None


class Two(Block):
    def forward(self, x, residual):
        return residual + super().forward(x)


class Scaled(Block):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


class Dropping(Block):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(super().forward(x))


def with_act(act):
    block = Block()
    block.act = act
    return block


def quick_gelu():
    from transformers.activations import ACT2FN

    return with_act(ACT2FN["quick_gelu"])


def gelu_new():
    from transformers.activations import ACT2FN

    return with_act(ACT2FN["gelu_new"])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Residual, "it does not compute down(act(up(x))) in eval mode"),
        (Flat, "it does not compute down(act(up(x))) in eval mode"),
        (Hidden, "it does not compute down(act(up(x))) in training mode"),
        (Pair, "not of the shape (…, N, M)"),
        (Two, "its forward takes more than one tensor"),
        (Scaled, "it has parameters or buffers beside those of its layers: scale"),
        (Dropping, "its dropout (p=0.1) acts in training"),
        (quick_gelu, "its activation act is QuickGELUActivation(); STLMLP knows none, relu"),
        (gelu_new, "its activation act is NewGELUActivation()"),
        (lambda: with_act(None), "its activation act is None"),
    ],
)
def test_a_block_that_is_no_mlp_is_left_with_the_reason(make, reason, monkeypatch):
    """The table names it all the same: planted faults."""
    model = model_of(make())
    kind = type(model.block)
    monkeypatch.setitem(mlps.BLOCKS, f"{kind.__module__}.{kind.__qualname__}", ROLES)
    block = model.block
    report = fuse_mlps(model)
    assert list(report.fused) == ["first"]
    assert model.block is block
    assert reason in report.skipped["block"]
    assert report.skipped["block"] in str(report)


def test_no_weight_hides_a_difference():
    """Zeros, where all activations are alike, and half precision, where gelu and its approximation by tanh are."""
    for prepare in (lambda block: nn.init.zeros_(block.fc2.encoded_weight), lambda block: block.bfloat16()):
        model = model_of()
        prepare(model.block)
        report = fuse_mlps(model, roles={Block: ROLES._replace(activation="gelu_tanh")})
        assert "in eval mode" in report.skipped["block"]
        report.undo()
        assert set(fuse_mlps(model, roles={Block: ROLES}).fused) == {"first", "block"}


def test_gate_and_up_are_told_apart():
    import transformers.models.llama.modeling_llama as llama

    config = SimpleNamespace(hidden_size=K, intermediate_size=HIDDEN, mlp_bias=False, hidden_act="silu")
    model = to_stl(nn.ModuleDict({"mlp": llama.LlamaMLP(config)}))
    wrong = Roles(up="gate_proj", gate="up_proj", down="down_proj", activation="silu")
    with pytest.raises(ConversionError, match=r"does not compute down\(act\(gate\(x\)\)·up\(x\)\)"):
        fuse_mlps(model, roles={llama.LlamaMLP: wrong})
    assert fuse_mlps(model).fused["mlp"].roles == Roles("up_proj", "down_proj", "gate_proj", "silu")


def test_a_derived_class_is_fused_where_it_is_named(monkeypatch):
    class Derived(Block):
        pass

    class Chain(nn.Sequential):
        pass

    monkeypatch.setitem(mlps.BLOCKS, f"{__name__}.Block", ROLES)
    model = model_of(Derived())
    model.first = to_stl(Chain(nn.Linear(K, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, K)).double())
    with pytest.raises(ConversionError, match=r"nothing to fuse.*first: Chain is derived.*block: Derived is derived"):
        fuse_mlps(model)
    assert type(model.block) is Derived
    report = fuse_mlps(model, roles={Derived: ROLES})
    assert list(report.fused) == ["block"]
    assert "name it with roles={Chain: Roles(…)}" in report.skipped["first"]
    assert list(fuse_mlps(model, roles={Chain: Roles(up="0", down="2", activation="relu")}).fused) == ["first"]


def test_layers_that_cannot_run_as_one_are_named():
    model = model_of()
    model.block.fc2 = nn.Linear(HIDDEN, K).double()
    assert fuse_mlps(model, roles={Block: ROLES}).skipped == {"block": "fc2 is of class Linear, not STLLinear"}
    for other, reason in (
        (STLLinear(HIDDEN, K, config=STLConfig(rank=8)), "different configs"),
        (STLLinear(HIDDEN, K, config=CONFIG, norm=nn.LayerNorm(HIDDEN)), "a norm of its own"),
        (STLLinear.from_linear(nn.Linear(HIDDEN - 1, K), CONFIG), "do not follow each other"),
    ):
        model = model_of()
        model.block.fc2 = other.double()
        assert reason in fuse_mlps(model, roles={Block: ROLES}).skipped["block"]
    slow = to_stl(Model().double(), STLConfig(rank=8, backend="reference"))
    with pytest.raises(ConversionError, match="backend='reference' runs layers one by one"):
        fuse_mlps(slow)
    missing = fuse_mlps(model_of(), roles={Block: ROLES._replace(gate="fc3")})
    assert missing.skipped == {"block": "it has no layer fc3"}


def test_hooks_are_not_lost(fusions):
    """Those of the block or its activation keep it as it is; those of a layer go with the layer."""
    calls = []
    for part in ("", "act"):
        for hook in ("register_forward_hook", "register_state_dict_post_hook", "register_full_backward_hook"):
            model = model_of()
            getattr(model.block.get_submodule(part), hook)(lambda *_: calls.append(1))
            assert "hooks" in fuse_mlps(model, roles={Block: ROLES}).skipped["block"]
    model = model_of()
    model.block.forward = model.block.forward
    assert "a forward of its own" in fuse_mlps(model, roles={Block: ROLES}).skipped["block"]
    model = model_of()
    model.block.fc1.register_forward_hook(lambda *_: calls.append(1))
    expected = model(X)
    fuse_mlps(model, roles={Block: ROLES})
    fusions.clear()
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)
    assert len(calls) == len(fusions) == 1  # the other MLP has no hook


# --- what must not happen


def test_the_model_is_not_touched_by_the_trial():
    """Its mode, its counters, its weights and the generators of random numbers are as before."""

    class Counting(Block):
        def __init__(self):
            super().__init__()
            self.calls, self.seen = 0, []

        def forward(self, x):
            self.calls += 1
            self.seen.append(x.shape)
            return super().forward(x)

    model = model_of(Counting())
    model.block.act.eval()
    model.train()
    model.first[0].eval()
    modes = {module: module.training for module in model.modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    block, generators = model.block, (torch.get_rng_state(), random.getstate())
    report = fuse_mlps(model, roles={Counting: ROLES})
    assert set(report.fused) == {"first", "block"}
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (block.calls, block.seen) == (0, [])
    assert all(training == module.training for module, training in modes.items())
    assert model.first.training and model.block.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_bad_roles_and_models_without_blocks():
    model = model_of()
    for roles in ({"Block": ROLES}, {Block: ("fc1", "fc2")}, {int: ROLES}):
        with pytest.raises(ConversionError, match="roles must be"):
            fuse_mlps(model, roles=roles)
    with pytest.raises(ConversionError, match="no block of the exact class Residual"):
        fuse_mlps(model, roles={Residual: ROLES})
    with pytest.raises(ConversionError, match="no block of a known class; name yours"):
        fuse_mlps(nn.ModuleList([to_stl(Block())]))
    with pytest.raises(ConversionError, match=r"the model: it is the model itself: build STLMLP\.from_layers"):
        fuse_mlps(to_stl(nn.Sequential(nn.Linear(K, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, K))))
    fuse_mlps(model, roles={Block: ROLES})
    with pytest.raises(ConversionError, match="nothing to fuse"):
        fuse_mlps(model)


def test_all_or_none():
    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(K, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, K))
            self.closed = True

        def __setattr__(self, name, value):
            if getattr(self, "closed", False):
                raise TypeError("closed")
            super().__setattr__(name, value)

    model = nn.ModuleList([to_stl(Model().double()), to_stl(Closed())])
    first = model[0].first
    with pytest.raises(ConversionError, match="Closed does not take another"):
        fuse_mlps(model)
    assert model[0].first is first
    assert type(model[1].mlp) is nn.Sequential


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_compiled_models_compute_the_same(copied, fusions):
    model = model_of()
    fuse_mlps(model, roles={Block: ROLES})
    other, expected = copied(model), model(X)
    assert other.block.fc1 is not model.block.fc1
    fusions.clear()
    with torch.no_grad():
        torch.testing.assert_close(other(X), expected)
        assert len(fusions) == 2
        nn.init.zeros_(model.block.fc2.encoded_weight)
        torch.testing.assert_close(other(X), expected)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(other, fullgraph=True, backend="aot_eager")(X), expected)


def test_a_padded_batch_gives_what_each_sample_gives_alone(fusions):
    """In inference and in training; once without padding the MLPs run as one operator again."""
    lengths = (7, 5, 2)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    model = Model().double().eval()
    stl.convert(model, CONFIG, example_inputs={"x": X, "attention_mask": mask.long()}, force_mixing=["*"],
                filter_fn=lambda *_: True)  # fmt: skip
    alone = [model(x[None, :length])[0] for x, length in zip(X, lengths, strict=True)]
    report = fuse_mlps(model, roles={Block: ROLES})
    assert set(report.fused) == {"first", "block"}
    for other in (model, copy.deepcopy(model)):
        for learning in (False, True):
            fusions.clear()
            with torch.set_grad_enabled(learning):
                y = other(X, attention_mask=mask.long())
                assert not fusions, "padding rows are zeroed between the layers"
                for found, length, expected in zip(y, lengths, alone, strict=True):
                    torch.testing.assert_close(found[:length], expected)
                torch.testing.assert_close(other(X[:1])[0], alone[0])
                assert len(fusions) == (0 if learning else 2)


@pytest.mark.parametrize("fusion_first", [True, False])
def test_conversion_and_fusion_are_undone_in_either_order(fusion_first):
    model = Model().double().eval()
    modules, expected = dict(model.named_modules()), model(X)
    conversion = stl.convert(model, CONFIG, example_inputs=X, force_mixing=["*"], filter_fn=lambda *_: True)
    fusion = fuse_mlps(model, roles={Block: ROLES})
    for report in (fusion, conversion) if fusion_first else (conversion, fusion):
        report.undo()
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(X), expected)


def test_fp8_goes_on_top_and_comes_off_again():
    model = model_of().float()
    report = fuse_mlps(model, roles={Block: ROLES})
    with torch.no_grad():
        expected = model(X.float())
        quantized = stl.quantize_fp8(model)
        assert len(quantized.converted) == 4
        assert 0.001 < float((model(X.float()) - expected).norm() / expected.norm()) < 0.3
        quantized.undo()
        assert torch.equal(model(X.float()), expected)
    report.undo()
    assert type(model.block) is Block


class Named(Block):
    def forward(self, hidden_states):
        return super().forward(hidden_states)


def test_callers_may_name_what_they_hand_over():
    model = model_of(Named())
    expected = model.block(hidden_states=X)
    fuse_mlps(model, {Named: ROLES})
    assert type(model.block).__name__ == "STLMLP"
    torch.testing.assert_close(model.block(hidden_states=X), expected)
    with pytest.raises(TypeError, match="takes one tensor; got 2"):
        model.block(X, hidden_states=X)


def test_a_conversion_undone_before_the_fusion_leaves_no_stl_layer():
    """They would stay without their mask: padding would reach real rows."""
    model = Model().double().eval()
    dense = call(model, {"x": X})
    done = convert(model, STLConfig(mixing="none"), filter_fn=lambda _, name: name.startswith("first"))
    fusion = fuse_mlps(model)
    done.undo()
    assert not [m for m in model.modules() if type(m) is STLLinear]
    torch.testing.assert_close(call(model, {"x": X}), dense)
    fusion.undo()
    assert type(model.first) is nn.Sequential and not [m for m in model.modules() if type(m) is STLLinear]


def test_undo_leaves_the_modes_of_layers():
    model = model_of().train()
    model.block.fc1.eval()
    fuse_mlps(model, {Block: ROLES}).undo()
    assert not model.block.fc1.training and model.block.fc2.training and model.block.act.training
