"""If these fail, what a sequence gives depends on how far its batch was padded. Broken on purpose, it is seen to."""

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from strassen_tile import STLConfig, STLLinear
from strassen_tile.errors import ShapeError
from strassen_tile.nn import PaddingMask

K, P = 6, 4
CONFIG = STLConfig(tile=(P, 2, 3), rank=7)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
X = torch.randn(3, 7, K, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Plain(nn.Module):
    """Two row-mixing layers; takes no mask."""

    def __init__(self, config=CONFIG):
        super().__init__()
        self.padding = PaddingMask()
        self.first, self.second = (STLLinear(K, K, config=config, dtype=torch.float64) for _ in range(2))
        self.first.padding = self.second.padding = self.padding

    def forward(self, x):
        return self.second(self.first(x).relu())


class Masked(Plain):
    """Takes `attention_mask`, by name or as its second argument, and fails when told to."""

    fail = False

    def forward(self, x, attention_mask=None, past_key_values=None):
        y = self.second(self.first(x).relu())
        if self.fail:
            raise RuntimeError("out of memory")
        return y


def spread(model, **options):
    """The largest change of a real row when the sample stands alone, unpadded."""
    y = model(X, **options)
    alone = [model(X[i : i + 1, : int(MASK[i].sum())]) for i in range(3)]
    return max(float((y[i : i + 1, : a.shape[1]] - a).detach().abs().max()) for i, a in enumerate(alone))


def attached():
    model = Masked()
    model.padding.attach(model)
    return model


def test_layer_shows_no_trace_of_padding_inside_the_context():
    model = Plain()
    with model.padding(MASK):
        y = model(X)
        assert torch.equal(y, model(X))  # the second call inside is masked too
        noisy = torch.where(MASK[..., None] == 1, X, 1e6)
        assert torch.equal(model(noisy)[MASK == 1], y[MASK == 1])
    assert model.padding.mask is None
    assert not torch.equal(model(X)[MASK == 1], y[MASK == 1])  # without it padding is data


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_of_any_dtype_is_followed_by_name_and_by_position(dtype, monkeypatch):
    model, mask = attached(), MASK.to(dtype)
    assert spread(model, attention_mask=mask) < 1e-12
    assert torch.equal(model(X, mask), model(X, attention_mask=mask))
    assert spread(model) > 1e-3
    monkeypatch.setattr(PaddingMask, "zero", lambda self, x: x)
    assert spread(model, attention_mask=mask) > 1e-3


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[1, 0, 1]], [[1, 1, 1], [0, 0, 1]]], ids=str)
def test_padding_before_real_rows_is_refused(mask):
    with pytest.raises(ShapeError, match="pad on the right"):
        attached()(torch.randn(len(mask), 3, K).double(), attention_mask=torch.tensor(mask))
    with pytest.raises(ShapeError, match="pad on the right"), PaddingMask()(torch.tensor(mask)):
        pass


def test_padding_on_the_left_would_indeed_show():
    model, x = Plain(), X[2:, :6]
    shifted = torch.cat([torch.zeros(1, 1, K, dtype=torch.float64), x], dim=1)
    assert not torch.allclose(model(shifted)[:, 1:], model(x), rtol=1e-3)


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(3, 1, 7)], ids=["1-D", "3-D"])
def test_mask_of_another_shape_is_refused(mask):
    with pytest.raises(ShapeError, match=r"\(B, N\)"), PaddingMask()(mask):
        pass


def test_rows_that_the_mask_does_not_describe_are_refused():
    with pytest.raises(ShapeError, match=r"\(3, 6\).*\(3, 7, 6\)"):
        attached()(X, attention_mask=MASK[:, :6])
    with pytest.raises(ShapeError, match=r"does not say which rows are padding"):
        attached()(X, attention_mask=torch.ones(3, 1, 7, 7))
    model = attached()
    with model.padding(MASK):  # what the message asks for
        assert torch.equal(model(X, attention_mask=torch.ones(3, 1, 7, 7)), model(X))


def test_mask_is_gone_after_a_call_and_after_one_that_failed():
    model = attached()
    expected = model(X)
    model(X, attention_mask=MASK)
    assert model.padding.mask is None
    model.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        model(X, attention_mask=MASK)
    model.fail = False
    assert model.padding.mask is None
    with pytest.raises(ShapeError):
        model(X, attention_mask=MASK.flip(1))
    assert torch.equal(model(X), expected)
    with pytest.raises(ZeroDivisionError), model.padding(MASK):
        raise ZeroDivisionError
    assert torch.equal(model(X), expected)


def test_contexts_nest_and_a_call_may_bring_its_own_mask():
    model, other = attached(), torch.ones(3, 7)
    with model.padding(MASK):
        inside = model(X)
        with model.padding(other):
            assert torch.equal(model(X), model(X, attention_mask=other))
        assert torch.equal(model(X, attention_mask=other), model(X, attention_mask=torch.ones(3, 7)))
        assert torch.equal(model(X), inside)


def test_copies_do_not_share_the_mask():
    model = attached()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.first.padding is twin.second.padding is twin.padding is not model.padding
        with model.padding(MASK):
            assert twin.padding.mask is None
        assert torch.equal(twin(X, attention_mask=MASK), model(X, attention_mask=MASK))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_see_the_mask_again(reentrant):
    class Checkpointed(Masked):
        def forward(self, x, attention_mask=None):
            return self.second(checkpoint(self.first, x, use_reentrant=reentrant).relu())

    def gradients(kind):
        torch.manual_seed(0)
        model, found = kind(), []
        model.padding.attach(model)
        for mask in (MASK, torch.ones(3, 7), MASK):  # several steps, each with its own padding
            x = X.clone().requires_grad_()
            model.zero_grad()
            with torch.no_grad():
                model(X, attention_mask=MASK[:1].expand(3, -1))  # a look in between, which no backward pass follows
            model(x, attention_mask=mask)[mask == 1].square().sum().backward()
            found += [x.grad, *(p.grad.clone() for p in model.parameters())]
        return found

    for a, b in zip(gradients(Checkpointed), gradients(Masked), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    # Calls with other padding, or none, before one backward pass, in any order of it: each is run again with its own.
    for masks in ((None, MASK), (MASK, torch.ones(3, 7), MASK.flip(0)), (MASK, MASK.clone(), None)):

        def together(kind, masks=masks):
            torch.manual_seed(0)
            model = kind()
            model.padding.attach(model)
            xs = [X.clone().requires_grad_() for _ in masks]
            losses = [model(x, attention_mask=mask).square().sum() for x, mask in zip(xs, masks, strict=True)]
            model(X.clone().requires_grad_(), attention_mask=MASK)  # evaluated with gradients on, never followed up
            (losses[1] + sum(losses) - losses[1]).backward()
            return [t.grad for t in (*xs, *model.parameters())]

        for a, b in zip(together(Checkpointed), together(Masked), strict=True):
            assert torch.equal(a, b)


def test_plain_step_and_then_a_checkpointed_one_with_an_equal_mask():
    model = attached()
    for fn in (model.first, lambda x: checkpoint(model.first, x, use_reentrant=False)):
        model.forward = lambda x, attention_mask=None, fn=fn: model.second(fn(x).relu())
        model.zero_grad()
        model(X, attention_mask=MASK.clone()).square().sum().backward()
        if fn is model.first:
            expected = [p.grad.clone() for p in model.parameters()]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_with_inside_a_checkpoint_and_an_inner_call_of_another_padding(reentrant):
    """The mask of the call around a checkpoint is for what lies directly in it, not for what says its own."""

    class Outer(Plain):
        checkpointed = False

        def __init__(self):
            super().__init__()
            self.inner = Masked()
            self.inner.first.padding = self.inner.second.padding = self.padding

        def body(self, x):
            with self.padding(torch.ones(3, 7)):
                x = self.second(x)
            return self.first(self.inner(x, attention_mask=MASK.flip(0)))

        def forward(self, x, attention_mask=None):
            return checkpoint(self.body, x, use_reentrant=reentrant) if self.checkpointed else self.body(x)

    model = Outer()
    model.padding.attach(model)
    found = []
    for model.checkpointed in (False, True):
        model.zero_grad()
        x = X.clone().requires_grad_()
        model(x, attention_mask=MASK).square().sum().backward()
        found.append([x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 17 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_masks_kept_for_a_backward_pass_go_with_its_graph(reentrant):
    model, kept = attached(), []

    def forward(x, attention_mask=None):
        kept.append(weakref.ref(model.padding.mask))
        return checkpoint(model.first, x, use_reentrant=reentrant)

    model.forward = forward
    y = model(X.clone().requires_grad_(), attention_mask=MASK)
    gc.collect()
    assert kept[0]() is not None
    y.sum().backward()
    del y
    gc.collect()
    assert kept[0]() is None


def test_a_backward_pass_that_runs_layers_by_itself_is_refused():
    model = attached()
    model(X, attention_mask=MASK)

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return model.first(grad)

    loss = Again.apply(X.clone().requires_grad_()).sum()
    with pytest.raises(ShapeError, match="backward pass"):
        loss.backward()


class Cache:
    def __init__(self, rows):
        self.rows = rows

    def get_seq_length(self):
        return self.rows


@pytest.mark.parametrize("mixing", ["causal", "sequence"])
def test_a_cached_sequence_goes_on_only_where_a_tile_begins(mixing):
    model = Masked(STLConfig(tile=(P, 2, 3), rank=7, mixing=mixing))
    model.padding.attach(model)
    for rows in (0, P, 3 * P):
        model(X, past_key_values=Cache(rows))
    for rows in (1, P - 1, P + 1):
        with pytest.raises(ShapeError, match=f"a cache holds {rows} rows.*use_cache=False"):
            model(X[:, :1], past_key_values=Cache(rows))
    assert model.padding.past == 0


def test_no_frame_of_a_call_is_kept():
    """What a caller holds, and what layers made in between, is gone with them, without a garbage collection."""

    def call(model):
        held = X.clone()
        model(held, attention_mask=MASK)
        return weakref.ref(held)

    model = attached()
    gc.collect()
    gc.disable()
    try:
        assert call(model)() is None
    finally:
        gc.enable()


def test_handles_detach_the_mask():
    model = Masked()
    handles = model.padding.attach(model)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(X, attention_mask=MASK), model(X))


def test_compiles_with_the_mask():
    torch._dynamo.reset()
    model = attached()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, attention_mask=MASK), model(X, attention_mask=MASK))
    torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model_refuses_padding_on_the_left_and_follows_a_with(backend):
    torch._dynamo.reset()
    model = attached()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = model(X, attention_mask=MASK)
    torch.testing.assert_close(compiled(X, attention_mask=MASK), expected)
    with pytest.raises((ShapeError, RuntimeError), match="pad on the right"):
        compiled(X, attention_mask=MASK.flip(1))
    unmasked = compiled(X)
    torch.testing.assert_close(unmasked, model(X))
    for mask in (MASK, MASK.flip(0)):
        with model.padding(mask):
            torch.testing.assert_close(compiled(X), model(X, attention_mask=mask))
    torch.testing.assert_close(compiled(X), unmasked)


def test_a_graph_that_holds_the_hooks_looks_at_the_values_itself():
    torch._dynamo.reset()
    model = attached()
    step = torch.compile(lambda x, mask: model(x, attention_mask=mask) * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(X, MASK), model(X, attention_mask=MASK) * 2)
    with pytest.raises(RuntimeError, match="pad on the right"):
        step(X, MASK.flip(1))
    bare = torch.compile(lambda x: model(x) * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(bare(X), model(X) * 2)
    for mask in (MASK, MASK.flip(0)):
        with model.padding(mask):
            torch.testing.assert_close(bare(X), model(X, attention_mask=mask) * 2)
    torch.testing.assert_close(bare(X), model(X) * 2)


def test_a_compiled_layer_of_an_uncompiled_model():
    torch._dynamo.reset()
    model = attached()
    expected = [model(X, attention_mask=mask) for mask in (MASK, None, MASK.flip(0))]
    model.first.compile(backend="aot_eager", fullgraph=True)
    for mask, y in zip((MASK, None, MASK.flip(0)), expected, strict=True):
        torch.testing.assert_close(model(X, attention_mask=mask), y)
    model.forward = lambda x, attention_mask=None: checkpoint(model.first, x, use_reentrant=False)
    y = model(X, attention_mask=MASK)
    with pytest.raises(ShapeError, match="compiled code runs again"):
        y.sum().backward()
    with model.padding(MASK):  # what the message asks for
        model(X, attention_mask=MASK).sum().backward()


def test_exported_model_takes_masks_and_refuses_padding_on_the_left():
    model = attached()
    program = torch.export.export(model, (X, MASK)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(X, MASK.flip(0)), model(X, MASK.flip(0)))
        with pytest.raises(RuntimeError, match="pad on the right"):
            program(X, MASK.flip(1))


def test_forward_called_as_such_follows_its_mask_too():
    """As sentence-transformers does."""
    model = attached()
    expected = model(X, attention_mask=MASK)
    assert torch.equal(model.forward(X, attention_mask=MASK), expected)
    assert not torch.equal(model.forward(X), expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin.forward(X, attention_mask=MASK), expected)  # of the copy, not of what it was copied from
    assert (
        list(inspect.signature(model.forward).parameters) == list(inspect.signature(type(model).forward).parameters)[1:]
    )


class Tower(nn.Module):
    """A model of images that makes masks of its own for one inside, which asks for (B, N) where it is called by others."""

    main_input_name = "pixel_values"

    def __init__(self, hidden):
        super().__init__()
        self.inner, self.hidden = Masked(), hidden

    def forward(self, pixel_values):
        return self.inner(pixel_values, attention_mask=self.hidden)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_tower_may_hand_down_a_mask_that_hides_nothing_and_no_other(dtype):
    """One row of padding, at the very end, that the tower was told of under another name."""
    sees = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    hides = sees.clone()
    hides[1, :, :, -1] = False

    def form(mask):
        return mask if dtype == torch.bool else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)

    for mask, fine in ((sees, True), (hides, False)):
        model = Tower(form(mask))
        model.inner.padding.attach(model)
        if fine:
            assert torch.equal(model(X), model.inner.second(model.inner.first(X).relu()))
        else:
            with pytest.raises(ShapeError, match="does not say which rows are padding, and hides some"):
                model(X)
