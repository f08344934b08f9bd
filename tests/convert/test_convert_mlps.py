"""Blocks that are MLPs of converted layers: recognised by what they compute, in one step only where that changes nothing."""

import collections
import copy
import functools
import gc
import importlib
import inspect
import linecache
import pickle
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import strassen_tile as stl
import strassen_tile.nn.adopt as adopt_module
from strassen_tile.errors import ShapeError
from strassen_tile.nn.reading import recognise

EXACT = stl.STLConfig(rank=49, basis="strassen")
APART = stl.STLConfig(rank=16, basis="naive", mixing="none")  # a block alone shows of no rows that they may meet


class Plain(nn.Module):
    """Two layers under names of its own, the activation a function."""

    def __init__(self, activate=torch.relu):
        super().__init__()
        self.b, self.a = nn.Linear(12, 8), nn.Linear(8, 12)
        self.activate = activate

    def forward(self, x):
        return self.b(self.activate(self.a(x)))


class Steps(Plain):
    """Names that are assigned again and again, and a function of the module's."""

    def forward(self, x):
        """Two steps and a third."""
        x = self.a(x)
        x = nn.functional.gelu(x, approximate="tanh")
        return self.b(x)


class Bilinear(Plain):
    def __init__(self):
        super().__init__()
        self.c = nn.Linear(8, 12)

    def forward(self, x):
        return self.b(self.a(x) * self.c(x))


class Own(nn.Module):
    """An activation as transformers has them: a module around a function."""

    def __init__(self, act=nn.functional.gelu):
        super().__init__()
        self.act = act

    def forward(self, given):
        return self.act(given)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 12, bias=False), nn.Linear(12, 6, bias=False), nn.Linear(8, 12)

    def forward(self, hidden):
        return self.w2(nn.functional.silu(self.w1(hidden)) * self.w3(hidden))


class Network(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block, self.head = block, nn.Linear(8, 3)

    def forward(self, x):
        return self.block(x)


def sequential(*between):
    return nn.Sequential(nn.Linear(8, 12), *between, nn.Linear(12, 8))


def linears(block):
    return {name: m for name, m in block.named_children() if isinstance(m, nn.Linear)}


def roles(block):
    found = recognise(block, linears(block))
    return None if found is None else tuple(found[0])


@pytest.mark.parametrize(
    "block,expected",
    [
        (Plain(), ("a", "b", None, "relu")),
        (Plain(nn.functional.silu), ("a", "b", None, "silu")),
        (Plain(functools.partial(nn.functional.gelu, approximate="tanh")), ("a", "b", None, "gelu_tanh")),
        (Plain(nn.Identity()), ("a", "b", None, "none")),
        (Plain(Own()), ("a", "b", None, "gelu")),
        (Steps(), ("a", "b", None, "gelu_tanh")),
        (Bilinear(), ("c", "b", "a", "none")),
        (Gated(), ("w3", "w2", "w1", "silu")),
        (sequential(nn.GELU()), ("0", "2", None, "gelu")),
        (sequential(nn.GELU("tanh"), nn.Dropout(0.3)), ("0", "3", None, "gelu_tanh")),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(True), nn.Linear(8, 8)), ("0", "2", None, "relu")),
        (type("Kind", (nn.Sequential,), {})(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)), ("0", "2", None, "relu")),
        (sequential(nn.Tanh()), None),
        (sequential(nn.ReLU6()), None),
        (sequential(nn.ReLU(), nn.LayerNorm(12)), None),
        (sequential(nn.PReLU()), None),
        (sequential(nn.GELU(), nn.GELU()), None),
        (sequential(nn.Sequential(nn.GELU(), nn.Dropout(0.5))), None),
        (Plain(lambda x: x), None),
        (Plain(torch.tanh), None),
        (Plain(Own(torch.tanh)), None),
        (Plain(functools.partial(nn.functional.gelu, torch.ones(1))), None),
        (Plain(type("Subclass", (nn.GELU,), {"forward": lambda self, x: x})()), None),
    ],
    ids=lambda value: None if value is None or isinstance(value, tuple) else type(value).__name__,
)
def test_what_is_recognised(block: nn.Module, expected: tuple | None) -> None:
    layers = linears(block)
    assert roles(block) == expected
    assert linears(block) == layers
    assert all(m.training for m in block.modules())


class Residual(Plain):
    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


class ResidualWhereItFits(Plain):
    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        return x + y if x.shape == y.shape else y


class Clamped(Plain):
    def forward(self, x):
        return self.b(torch.relu(self.a(x)).clamp(max=10.0))


class Transposed(Plain):
    def forward(self, x):
        return self.b(torch.relu(self.a(x.transpose(0, 1)))).transpose(0, 1)


class InPlace(Plain):
    def forward(self, x):
        x = self.a(x)
        torch.relu_(x)
        return self.b(x)


class Forgotten(Plain):
    def forward(self, x):
        h = self.a(x)
        y = torch.relu(h)  # noqa: F841
        return self.b(h)


class Twice(Plain):
    def forward(self, x):
        h = self.a(x)
        return self.b(torch.relu(h) * h)


class Branching(Plain):
    def forward(self, x):
        if torch.is_grad_enabled():
            return self.b(torch.relu(self.a(x)))
        return self.b(torch.tanh(self.a(x)))


class Remembering(Plain):
    def forward(self, x):
        self.last = self.b(torch.relu(self.a(x)))
        return self.last


class Casting(Plain):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.b(torch.relu(self.a(x)))


class Decorated(Plain):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Optional(Plain):
    def forward(self, x, scale=1.0):
        return self.b(torch.relu(self.a(x))) * scale


class OwnDropout(Plain):
    def forward(self, x):
        return self.b(nn.functional.dropout(torch.relu(self.a(x)), 0.1))


class Power(Plain):
    def forward(self, x):
        return self.b(torch.pow(self.a(x), 3.0))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        raise AssertionError("must not be run to be looked at")


class Applying(Plain):
    def forward(self, x):
        return self.b(Swish.apply(self.a(x)))


class Down(Plain):
    def forward(self, x):
        return self.b(self.b(self.a(x)))


NOT_QUITE = [
    Residual,
    ResidualWhereItFits,
    Clamped,
    Transposed,
    InPlace,
    Forgotten,
    Twice,
    Branching,
    Remembering,
    Casting,
]
NOT_QUITE += [Decorated, Optional, OwnDropout, Power, Applying, Down]


@pytest.mark.parametrize("kind", NOT_QUITE)
def test_what_only_looks_like_an_mlp_is_left(kind: type[nn.Module]) -> None:
    """Each of these does what an MLP does on some inputs, or in some modes, or not at all."""
    assert roles(kind()) is None


def test_what_cannot_be_read_is_left() -> None:
    hooked, watched, patched = Plain(), Plain(nn.ReLU()), Plain()
    hooked.register_forward_hook(lambda *_: None)
    watched.activate.register_forward_hook(lambda *_: pytest.fail("called"))
    patched.forward = lambda x: x
    scope: dict = {}
    exec("def forward(self, x):\n    return self.b(self.activate(self.a(x)))", scope)
    sourceless = type("Sourceless", (Plain,), {"forward": scope["forward"]})()
    wrong = type("Odd", (Plain,), {"forward": 3})()
    for block in (hooked, watched, patched, sourceless, wrong):
        assert roles(block) is None


@pytest.mark.parametrize("after,expected", [("relu", ("a", "b", None, "relu")), ("tanh", None), ("silu", None)])
def test_a_source_that_has_changed_is_not_believed(after, expected, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a file is edited after it was imported."""
    monkeypatch.delitem(sys.modules, "edited_module", raising=False)
    text = "import torch\n\n\nclass M(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    text += "        self.a, self.b = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)\n\n    def forward(self, x):\n"
    text += "        return self.b(torch.{}(self.a(x)))\n"
    (tmp_path / "edited_module.py").write_text(text.format("relu"))
    monkeypatch.syspath_prepend(tmp_path)
    block = importlib.import_module("edited_module").M()
    (tmp_path / "edited_module.py").write_text(text.format(after))
    linecache.checkcache()
    assert roles(block) == expected


def test_classes_that_cannot_be_derived_from_are_left() -> None:
    """The layers are converted all the same, and everything can be undone."""

    class Demanding(Plain):
        def __init_subclass__(cls, *, key, **options):
            super().__init_subclass__(**options)

    class Strict(Plain):
        def __setattr__(self, name, value):
            if name not in {"a", "b", "activate", "training"} and not name.startswith("_"):
                raise AttributeError(name)
            super().__setattr__(name, value)

    x = torch.randn(2, 7, 8)
    for block, adopted in ((Demanding(), False), (Strict(), True)):
        network = Network(block).eval()
        expected = network(x)
        conversion = stl.convert(network, APART)
        assert bool(conversion.mlps) == adopted
        with torch.no_grad():
            torch.testing.assert_close(network(x), expected)
        conversion.undo()
        assert torch.equal(network(x), expected)
        assert type(network.block) in (Demanding, Strict)


def test_names_of_the_block_are_its_own() -> None:
    """Attributes called as ours are, a state of its own making, and a description of its own."""

    class Same(Plain):
        def __init__(self):
            super().__init__()
            self._roles, self.lock, self.norm = "mine", threading.Lock(), 3
            self._layers = torch.relu

        def forward(self, x):
            return self.b(self._layers(self.a(x)))

        def extra_repr(self):
            return "of its own"

        def __getstate__(self):
            return {key: value for key, value in self.__dict__.items() if key != "lock"}

    network, x = Network(Same()).eval(), torch.randn(2, 7, 8)
    conversion = stl.convert(network, APART)
    assert conversion.mlps == ["block"]
    expected = network(x)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected)
        other = copy.deepcopy(network)
        assert not hasattr(other.block, "lock")
        assert torch.equal(other(x), network(x))
    assert "of its own" in repr(network.block)
    conversion.undo()
    assert (network.block._roles, network.block.norm) == ("mine", 3)


@pytest.mark.parametrize(
    "make", [lambda: Plain(nn.functional.gelu), Steps, Gated, lambda: sequential(nn.SiLU(), nn.Dropout(0.5))]
)
def test_a_converted_block_computes_what_it_did(make) -> None:
    """With an exact basis, against the dense block: in inference, in training with its dropout, and its gradients."""
    block, x = make().double(), torch.randn(2, 7, 8, dtype=torch.float64)
    network = Network(copy.deepcopy(block))
    conversion = stl.convert(network, APART)
    assert conversion.mlps == ["block"]
    assert "run as MLPs: block" in str(conversion)
    assert isinstance(network.block, stl.STLMLP)
    assert isinstance(network.block, type(block))
    assert network.block.state_dict().keys() == {
        key.replace("weight", name)
        for key in block.state_dict()
        for name in (["encoder", "encoded_weight", "decoder", "meaning"] if "weight" in key else [key])
    }
    for training in (False, True):
        block.train(training)
        network.train(training)
        for learning in (False, True):
            with torch.set_grad_enabled(learning):
                torch.manual_seed(3)
                expected = block(x)
                torch.manual_seed(3)
                torch.testing.assert_close(network(x), expected)
    conversion.undo()
    assert type(network.block) is type(block)
    assert torch.equal(network.eval()(x), block.eval()(x))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each MLP that is run in one step."""
    steps: list[int] = []
    original = adopt_module.one_step
    monkeypatch.setattr(adopt_module, "one_step", lambda *a: steps.append(1) or original(*a))
    return steps


class Named(nn.Module):
    """A child called as its activation is."""

    def __init__(self):
        super().__init__()
        self.fc1, self.relu, self.fc2 = nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)

    def forward(self, x):
        return self.fc2(self.relu(self.fc1(x)))


def _set(name, value):
    return lambda block, patch: setattr(block, name, value)


def _patch(block, patch):
    type(block).__mro__[2].forward = lambda self, x: x


function = torch.relu


class Global(Plain):
    def forward(self, x):
        return self.b(function(self.a(x)))


class Recoded(Plain):
    def forward(self, x):
        return self.b(self.activate(self.a(x)))


def _recode(block, patch):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))

    block.forward.__wrapped__.__code__ = forward.__code__


def _reorder(block, patch):
    activation = block.relu
    del block.relu
    block.relu = activation


def _named_sequential():
    parts = {"fc1": nn.Linear(8, 8), "relu": nn.ReLU(), "fc2": nn.Linear(8, 8)}
    return nn.Sequential(collections.OrderedDict(parts))


class Buffered(Named):
    """Its own activation, whose function may be exchanged."""

    def __init__(self):
        super().__init__()
        self.relu = Own(torch.relu)


CHANGES = {
    "another global": (Global, lambda block, patch: patch.setitem(globals(), "function", torch.tanh)),
    "another F.gelu": (
        lambda: sequential(nn.GELU()),
        lambda block, patch: patch.setattr(nn.functional, "gelu", lambda x, **_: x),
    ),
    "another nn.ReLU.forward": (Named, lambda block, patch: patch.setattr(nn.ReLU, "forward", lambda self, x: x)),
    "dropout for Monte Carlo": (
        lambda: sequential(nn.GELU(), nn.Dropout(0.5)),
        lambda block, patch: patch.setattr(nn.Dropout, "forward", lambda self, x: nn.functional.dropout(x, 0.5)),
    ),
    "another class of a child": (Named, lambda block, patch: setattr(block.relu, "__class__", nn.Tanh)),
    "other code": (Recoded, _recode),
    "another order of the same": (_named_sequential, _reorder),
    "a partial function changed in place": (
        lambda: Plain(functools.partial(torch.relu)),
        lambda block, patch: block.activate.__setstate__((torch.tanh, (), {}, {})),
    ),
    "a compiled child": (Named, lambda block, patch: setattr(block.relu, "_compiled_call_impl", lambda x: x)),
    "another function": (Plain, _set("activate", torch.tanh)),
    "another function, past setattr": (Plain, lambda block, patch: vars(block).update(activate=torch.tanh)),
    "another function of a child": (Buffered, lambda block, patch: _set("act", torch.tanh)(block.relu, patch)),
    "another forward of a child": (Buffered, lambda block, patch: _set("forward", lambda x: x)(block.relu, patch)),
    "another child": (Named, _set("relu", nn.Tanh())),
    "another layer": (Named, _set("fc1", nn.Linear(8, 12))),
    "another kind of gelu": (
        lambda: sequential(nn.GELU()),
        lambda block, patch: _set("approximate", "tanh")(block[1], patch),
    ),
    "one more child": (lambda: sequential(nn.GELU()), lambda block, patch: block.append(nn.Tanh())),
    "another order": (lambda: sequential(nn.ReLU()), lambda block, patch: block.insert(0, nn.Tanh())),
    "dropout in eval mode": (lambda: sequential(nn.GELU(), nn.Dropout(0.5)), lambda block, patch: block[2].train()),
    "a forward of the class": (lambda: type("Patched", (Named,), {"forward": Named.forward})(), _patch),
    "a forward of the block": (Named, lambda block, patch: _set("forward", lambda x: x)(block, patch)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_after_conversion_counts(name: str, taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    make, change = CHANGES[name]
    network, x = Network(make()).eval(), torch.randn(2, 7, 8)
    assert stl.convert(network, APART).mlps == ["block"]
    with torch.no_grad():
        before = network(x)
        assert len(taken) == 1
        change(network.block, monkeypatch)
        after = network(x)
        assert len(taken) == 1
    if name != "another kind of gelu":  # whose results are nearly the same
        assert not torch.allclose(after, before, atol=1e-3)


def test_hooks_are_called(taken: list[int]) -> None:
    """On each child of a block, and those on all modules."""
    network, x = Network(sequential(nn.GELU(), nn.Dropout(0.5))).eval(), torch.randn(2, 7, 8)
    stl.convert(network, APART)
    with torch.no_grad():
        expected = network(x)
        for part in network.block:
            seen: list[nn.Module] = []
            handle = part.register_forward_hook(lambda m, args, y, seen=seen: seen.append(m))
            torch.testing.assert_close(network(x), expected)
            handle.remove()
            assert seen == [part]
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
        torch.testing.assert_close(network(x), expected)
        handle.remove()
        assert set(network.block) <= set(seen)
        assert len(taken) == 1
        network.train()
        assert not torch.equal(network(x), expected), "dropout"
        assert len(taken) == 1


def test_one_step_needs_one_dtype(taken: list[int]) -> None:
    """transformers keeps T5's second layer in float32, and casts on the way."""
    network, x = Network(Named()).eval(), torch.randn(2, 7, 8)
    assert stl.convert(network, APART).mlps == ["block"]
    network.block.fc2.double()
    with torch.no_grad(), pytest.raises(ShapeError, match="float64"):
        network(x)
    assert not taken


def test_a_copy_reads_its_own(taken: list[int]) -> None:
    """A shallow copy shares children, a deep one has its own; what is changed in a copy counts there alone."""
    network, x = Network(Plain()).eval(), torch.randn(2, 7, 8)
    stl.convert(network, APART)
    with torch.no_grad():
        expected = network(x)
        for copied in (copy.copy(network.block), copy.deepcopy(network.block)):
            assert torch.equal(copied(x), expected)
            copied.activate = torch.tanh
            assert not torch.allclose(copied(x), expected)
        assert torch.equal(network(x), expected)
    assert len(taken) == 4


def test_whole_networks_come_back_as_their_classes_now_are(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved whole, loaded after the class has changed: the new forward runs, as without us."""
    monkeypatch.setattr(Recoded, "forward", Recoded.forward)
    network, x = Network(Recoded()).eval(), torch.randn(2, 7, 8)
    stl.convert(network, APART)
    saved = pickle.dumps(network)
    monkeypatch.setattr(Recoded, "forward", Residual.forward)
    with torch.no_grad():
        torch.testing.assert_close(pickle.loads(saved)(x), x + network.block.b(torch.relu(network.block.a(x))))


def test_memory_is_given_back() -> None:
    """No cycle holds an adopted block until somebody collects garbage."""
    network = Network(Plain()).eval()
    stl.convert(network, APART)
    block, adopted = weakref.ref(network.block), isinstance(network.block, stl.STLMLP)
    gc.collect()
    gc.disable()
    try:
        del network
        assert adopted
        assert block() is None
    finally:
        gc.enable()


def test_as_others_see_it(taken: list[int]) -> None:
    """Its signature, replicas, modes of torch functions and subclasses of tensors, and layers taken away."""

    class Demanding(Plain):
        def __init__(self, needed):
            super().__init__()
            self._kind = needed

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return args[0] if func is torch.relu else func(*args, **(kwargs or {}))

    network, x = Network(Demanding(3)).eval(), torch.randn(2, 7, 8)
    assert stl.convert(network, APART).mlps == ["block"]
    assert list(inspect.signature(network.block.forward).parameters) == ["x"]
    assert isinstance(network.block._replicate_for_data_parallel(), Demanding)
    with torch.no_grad():
        expected = network(x)
        assert len(taken) == 1
        with Mode():
            assert not torch.allclose(network(x), expected)
        torch.testing.assert_close(
            network(x.as_subclass(type("Own", (torch.Tensor,), {}))).as_subclass(torch.Tensor), expected
        )
        assert len(taken) == 1
    shorter = Network(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))).eval()
    stl.convert(shorter, APART)
    del shorter.block[2]
    with torch.no_grad():
        assert (shorter(x) >= 0).all()


def test_undo_beside_others_who_change_the_class() -> None:
    network, x = Network(Named()).eval(), torch.randn(2, 7, 8)
    expected = network(x)
    conversion = stl.convert(network, APART)
    network.block.register_parameter("extra", nn.Parameter(torch.ones(2)))
    nn.utils.parametrize.register_parametrization(network.block, "extra", nn.Identity())
    conversion.undo()
    assert torch.equal(network.block.extra, torch.ones(2))
    with torch.no_grad():
        assert torch.equal(network(x), expected)


def test_padding_rows_stay_out_of_an_mlp(taken: list[int]) -> None:
    """act(bias) of a padding row must not reach a real one: while there is a mask, the layers run one by one."""
    network = Network(sequential(nn.GELU()))
    x = torch.randn(1, 8, 8)
    keep = lambda module, name: name != "head"  # noqa: E731
    conversion = stl.convert(network, stl.STLConfig(rank=49), example_inputs=x, filter_fn=keep, force_mixing=["*"])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    network.eval()
    with torch.no_grad():
        short = network(x[:, :5])
        assert len(taken) == 1
        with conversion.padding(mask):
            torch.testing.assert_close(network(x)[:, :5], short)
        assert len(taken) == 1
        assert not torch.allclose(network(x)[:, :5], short), "rows mix: without the mask the padding would be seen"


def test_an_adopted_block_is_a_module_like_others() -> None:
    block = sequential(nn.GELU())
    network, x = Network(block), torch.randn(2, 7, 8)
    stl.convert(network, APART)
    network.eval()
    with torch.no_grad():
        expected = network(x)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert type(other.block) is type(block)
            assert torch.equal(other(x), expected)
            other.block[0].encoder.zero_()
            assert not torch.equal(other(x), expected), "the copy runs its own layers"
            assert torch.equal(network(x), expected)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(network, fullgraph=True)(x), expected)
        torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), expected)
    assert type(block[:1]) is nn.Sequential
    assert len(block) == 3


@pytest.mark.parametrize("family,blocks", [("Llama", 1), ("Qwen2", 1), ("Dinov2", 1), ("SiglipVision", 1)])
def test_blocks_of_transformers(family: str, blocks: int) -> None:
    """Siglip's second one, in its pooling head, is fed one row a sample and stays dense."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = family in ("Llama", "Qwen2")
    sizes |= (
        {"vocab_size": 64, "num_key_value_heads": 1} if text else {"image_size": 28, "patch_size": 14, "mlp_ratio": 2}
    )
    inputs = {"input_ids": torch.arange(9)[None]} if text else {"pixel_values": torch.randn(1, 3, 28, 28)}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}{'ForCausalLM' if text else 'Model'}")(config).eval()
    exact = stl.STLConfig(rank=16, basis="naive", mixing="none") if text else EXACT
    with torch.no_grad():
        expected = model(**inputs)[0]
        conversion = stl.convert(model, exact, example_inputs=inputs)
        assert len(conversion.mlps) == blocks, str(conversion)
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-3, atol=1e-4)
