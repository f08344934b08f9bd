"""If these fail, one call's padding is taken for another's: of another thread, task, copy, or a call that was broken off."""

import asyncio
import contextvars
import copy
import inspect
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import strassen_tile
from strassen_tile import STLConfig, STLLinear, convert
from strassen_tile.errors import ShapeError

K = 6
CONFIG = STLConfig(tile=(4, 2, 3), rank=7)
X = torch.randn(3, 7, K, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
MASKS = [None, *(torch.arange(7) < torch.tensor(lengths)[:, None] for lengths in ([6, 3, 7], [1, 7, 2], [7, 7, 7]))]


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(K, K), nn.Linear(K, K)

    def meet(self):
        """What happens between the two layers."""

    def forward(self, x):
        y = self.first(x).relu()
        self.meet()
        return self.second(y)


class Model(nn.Module):
    """Takes a mask, and runs its layers a level down, checkpointed or not."""

    def __init__(self):
        super().__init__()
        self.body, self.checkpointed = Body(), False

    def forward(self, x, attention_mask=None):
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)


def converted():
    torch.manual_seed(0)
    model = Model().double()
    return model, convert_all(model)


def convert_all(model):
    return convert(model, CONFIG, example_inputs=X, filter_fn=lambda layer, name: True, force_mixing=["*"])


def backward(model, x, mask, *, held=False):
    """Output, gradient of x, and of the parameters: of one call."""
    x = x.clone().requires_grad_()
    if held and mask is not None:
        with strassen_tile.padding(model, mask):
            y = model(x)
    else:
        y = model(x, attention_mask=mask)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_a_thousand_calls_from_eight_threads_are_what_they_are_alone():
    model, _ = converted()
    other = copy.deepcopy(model)
    other.checkpointed = True
    cases = [(which, i, held) for which in (model, other) for i in range(len(MASKS)) for held in (False, True)]
    alone = [backward(which, X, MASKS[i], held=held) for which, i, held in cases]
    assert not torch.equal(alone[0][0], alone[2][0])

    def call(number):
        which, i, held = cases[number % len(cases)]
        return same(backward(which, X, MASKS[i], held=held), alone[number % len(cases)])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(1000)))


def test_calls_that_are_in_the_middle_at_the_same_moment():
    model, done = converted()
    alone = [model(X, attention_mask=mask) for mask in MASKS]
    model.body.meet = threading.Barrier(len(MASKS)).wait  # each waits for all others between its two layers
    with ThreadPoolExecutor(len(MASKS)) as pool:
        together = list(pool.map(lambda mask: model(X, attention_mask=mask), MASKS))
    assert same(together, alone)
    model.body.meet = threading.Barrier(2).wait

    def within(mask):
        if mask is None:
            return model(X)
        with done.padding(mask):
            return model(X)

    with ThreadPoolExecutor(2) as pool:
        assert same(pool.map(within, MASKS[:2]), alone[:2])


def test_replicas_in_threads_as_data_parallel_makes_them():
    model, _ = converted()
    alone = [model(X, attention_mask=mask) for mask in MASKS]

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = replicate(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach())
        return replica

    replicas = [replicate(model) for _ in MASKS]
    barrier = threading.Barrier(len(MASKS))
    for replica in replicas:
        replica.body.meet = barrier.wait
    with ThreadPoolExecutor(len(MASKS)) as pool:
        assert same(pool.map(lambda r, mask: r(X, attention_mask=mask), replicas, MASKS), alone)


def test_a_part_of_a_call_done_by_another_thread_is_refused():
    model, _ = converted()
    body = model.body
    with ThreadPoolExecutor(1) as pool:
        model.forward = lambda x, attention_mask=None: pool.submit(body, x).result()
        assert torch.equal(model(X), body(X))
        with pytest.raises(ShapeError, match="another thread"):
            model(X, attention_mask=MASKS[1])
        model(X)  # once it is over, nothing is left of it


def test_tasks_hold_masks_over_an_await():
    model, done = converted()
    alone = [model(X, attention_mask=mask) for mask in MASKS]

    async def task(mask):
        if mask is None:
            await asyncio.sleep(0)
            return model(X)
        with done.padding(mask):
            await asyncio.sleep(0)
            inside = await asyncio.to_thread(model, X)
            assert torch.equal(inside, model(X))
        await asyncio.sleep(0)
        assert torch.equal(model(X), alone[0])
        return inside

    async def run():
        return await asyncio.gather(*map(task, MASKS * 3))

    assert same(asyncio.run(run()), alone * 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_nothing_is_left_of_a_call_that_was_broken_off(error):
    model, done = converted()
    body, whole, alone = model.body(X), model(X), model(X, attention_mask=MASKS[1])

    def interrupt():
        raise error

    model.body.meet = interrupt
    with pytest.raises(error):
        model(X, attention_mask=MASKS[1])
    del model.body.meet
    assert done.padding.mask is None
    assert torch.equal(model.body(X), body)  # a part of it alone, before any call that could clear up
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(model.body, X).result(), body)
    with done.padding(MASKS[1]):
        assert torch.equal(model.body(X), alone)
    assert torch.equal(model(X), whole)


def test_a_with_that_an_exit_stack_holds_and_one_inside_forward():
    model, done = converted()
    alone = [model(X, attention_mask=mask) for mask in MASKS]
    with ExitStack() as stack:
        stack.enter_context(done.padding(MASKS[1]))
        assert torch.equal(model(X), alone[1])

    def forward(x, attention_mask=None):
        with ExitStack() as stack:
            stack.enter_context(strassen_tile.padding(model, MASKS[2]))
            inside = model.body(x)
        return inside, model.body(x)

    model.forward = forward
    assert same(model(X, attention_mask=MASKS[1]), [alone[2], alone[1]])


@pytest.mark.parametrize("last_first", [False, True])
def test_withs_of_generators_close_in_any_order_and_leave_nothing(last_first):
    model, _ = converted()
    alone = [model(X, attention_mask=mask) for mask in MASKS]

    def infer(mask):
        with strassen_tile.padding(model, mask):
            yield
            yield model(X)

    first, second = infer(MASKS[1]), infer(MASKS[2])
    next(first)
    next(second)
    assert torch.equal(next(first), alone[2])  # as documented: the one opened last of those still open
    closed, left = (second, first) if last_first else (first, second)
    closed.close()
    assert torch.equal(model(X), alone[1 if last_first else 2])
    left.close()
    assert torch.equal(model(X), alone[0])


def test_a_with_that_closes_in_another_task_takes_nothing_of_that_ones():
    model, done = converted()
    alone = [model(X, attention_mask=mask) for mask in MASKS]

    def hold():
        with done.padding(MASKS[1]):
            yield

    opened = hold()
    contextvars.copy_context().run(next, opened)
    with done.padding(MASKS[2]):
        opened.close()
        assert torch.equal(model(X), alone[2])
    assert torch.equal(model(X), alone[0])


@pytest.mark.filterwarnings("ignore:coroutine")
def test_forwards_that_run_after_their_call_are_refused():
    class Later(Model):
        async def forward(self, x, attention_mask=None):
            return self.body(x)

    class Streamed(Model):
        def forward(self, x, attention_mask=None):
            yield self.body(x)

    for kind in (Later, Streamed):
        model = Model().double()
        convert_all(model)
        model.__class__ = kind
        output = model(X)  # nothing is masked, so nothing is lost
        if inspect.iscoroutine(output):
            output.close()
        with pytest.raises(ShapeError, match="generator or a coroutine"):
            model(X, attention_mask=MASKS[1])


def test_copies_follow_their_own_calls_and_the_mask_is_found_on_them():
    model, done = converted()
    alone, unmasked = model(X, attention_mask=MASKS[1]), model(X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(twin(X, attention_mask=MASKS[1]), alone)
        with strassen_tile.padding(twin, MASKS[1]):
            assert torch.equal(twin(X), alone)
            assert torch.equal(model(X), unmasked)
        with done.padding(MASKS[1]):
            assert torch.equal(twin(X), unmasked)
            assert torch.equal(model(X), alone)
        assert twin.body.first.padding is twin.body.second.padding is not model.body.first.padding


def test_layers_that_follow_no_mask_say_so():
    by_hand = nn.Sequential(STLLinear(K, K, config=CONFIG))
    with pytest.raises(ShapeError, match="follow no mask"), strassen_tile.padding(by_hand, MASKS[1]):
        pass
    apart = nn.Sequential(STLLinear(K, K, config=STLConfig(tile=(1, 2, 3))))
    with strassen_tile.padding(apart, MASKS[1]):  # nothing mixes, so nothing has to be held
        apart(X.float())


def test_undo_leaves_no_hook_behind():
    model, done = converted()
    assert model._forward_pre_hooks and model._forward_hooks
    done.undo()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
