"""If these fail, what a sentence gives depends on how far its batch was padded, or on what it is batched with."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import APART, CAUSAL, IDS, MASK, SEQUENCE, VOCABULARY, Tokens, bert, distilbert, llama, t5
from torch import nn

from strassen_tile import check_mixing, convert
from strassen_tile.errors import ConversionError, ShapeError
from strassen_tile.nn import PaddingMask

hf = pytest.importorskip("transformers")
LENGTHS = MASK.sum(dim=1).tolist()
EXAMPLES = {"input_ids": IDS, "attention_mask": MASK}


def converted(make=bert, config=SEQUENCE):
    model = make()
    return model, convert(model, config, example_inputs=hf.BatchEncoding(EXAMPLES))


def spread(logits):
    """The largest change of a sentence's logits over ways to batch and pad it: logits(ids, mask) → (B, …)."""
    alone = [logits(IDS[i : i + 1, :n], MASK[i : i + 1, :n]) for i, n in enumerate(LENGTHS)]
    junk = torch.where(MASK == 1, IDS, (IDS + 17) % VOCABULARY)
    further = torch.cat([junk, junk], dim=1), torch.cat([MASK, torch.zeros_like(MASK)], dim=1)
    order = torch.tensor([2, 0, 1])
    worst = 0.0
    for ids, mask, names in ((IDS, MASK, range(3)), (*further, range(3)), (junk[order], MASK[order], order.tolist())):
        batch = logits(ids, mask)
        worst = max(worst, *(float((batch[row] - alone[i][0]).abs().max()) for row, i in enumerate(names)))
    return worst


@torch.no_grad()
@pytest.mark.parametrize("make", [bert, distilbert], ids=["bert", "distilbert"])
def test_logits_do_not_depend_on_the_batch(make, monkeypatch):
    model, done = converted(make)
    assert len(done.converted) == (12 if make is bert else 6)
    by_name = lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits  # noqa: E731
    by_position = lambda ids, mask: model(ids, mask).logits  # noqa: E731
    assert spread(by_name) < 1e-10
    assert spread(by_position) < 1e-10
    monkeypatch.setattr(PaddingMask, "zero", lambda self, x: x)
    assert spread(by_name) > 1e-6


@torch.no_grad()
def test_models_inside_are_guarded_when_called_past_the_outer_one(monkeypatch):
    model, _ = converted()
    first_state = lambda ids, mask: model.bert(ids, mask).last_hidden_state[:, 0]  # noqa: E731
    assert spread(first_state) < 1e-10

    class Pipeline(nn.Module):  # as sentence-transformers: a dict of features, no attention_mask of its own
        def __init__(self):
            super().__init__()
            self.inner = bert()

        def forward(self, features):
            return self.inner(**features).logits

    pipeline = Pipeline()
    convert(pipeline, SEQUENCE, example_inputs=(EXAMPLES,))
    run = lambda ids, mask: pipeline({"input_ids": ids, "attention_mask": mask})  # noqa: E731
    assert spread(run) < 1e-10
    monkeypatch.setattr(PaddingMask, "zero", lambda self, x: x)
    assert spread(run) > 1e-6
    assert spread(first_state) > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("length", [7, pytest.param(5, marks=pytest.mark.slow)])
def test_model_inside_that_is_given_no_mask_has_no_padding(length):
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.other = bert("BertModel"), bert("BertModel")

        def forward(self, ids, attention_mask, others):
            return self.text(ids, attention_mask=attention_mask)[0], self.other(others)[0]

    model = Towers()
    done = convert(model, SEQUENCE, example_inputs=(IDS, MASK, IDS))
    others = IDS.flip(0)[:, :length]
    assert torch.equal(model(IDS, MASK, others)[1], model.other(others)[0])
    assert torch.equal(model(IDS, MASK, others)[0], model.text(IDS, MASK)[0])
    with done.padding(MASK[:, :length]):  # what a caller holds is for models called without a mask, too
        held = model.other(others)[0]
    assert not torch.equal(held, model.other(others)[0])


@torch.no_grad()
def test_rows_apart_need_no_mask():
    model, done = converted(config=APART)
    assert done.padding is None
    assert spread(lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits) < 1e-10


def test_left_padding_is_refused():
    model, done = converted()
    with pytest.raises(ShapeError, match="padding_side = 'right'"):
        model(input_ids=IDS.flip(1), attention_mask=MASK.flip(1))
    assert done.padding.mask is None
    with pytest.raises(ShapeError, match="does not say which rows are padding"):
        model(input_ids=IDS, attention_mask=MASK[:, None, None, :].expand(3, 1, 7, 7))


@torch.no_grad()
def test_model_without_a_mask_is_called_inside_the_context():
    class Pooled(Tokens):  # finds its padding itself: token 0
        def forward(self, ids):
            real = (ids != 0)[..., None]
            x = self.embed(ids) * real
            y = self.inner(x)
            scores = (y @ y.mT).masked_fill(~real.mT, -torch.inf)
            return (self.outer(scores.softmax(dim=-1) @ y) * real).sum(dim=1)

    model = Pooled(backwards_only=False).double()
    model.inner.bias.data.fill_(1.0)
    done = convert(model, SEQUENCE, example_inputs=IDS)
    assert list(done.converted) == ["inner", "outer"]

    def within(ids, mask):
        with done.padding(mask):
            return model(ids * mask)

    assert spread(within) < 1e-10
    assert spread(lambda ids, mask: model(ids * mask)) > 1e-6


def test_mask_is_cleared_after_an_exception_in_forward(monkeypatch):
    model, done = converted()
    expected = model(input_ids=IDS).logits
    monkeypatch.setattr(model.classifier, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=IDS, attention_mask=MASK)
    assert done.padding.mask is None
    monkeypatch.undo()
    assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.slow), False])
def test_gradients_under_checkpointing_are_those_without(reentrant):
    def gradients(checkpointed):
        torch.manual_seed(0)
        model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        convert(model, SEQUENCE, example_inputs=EXAMPLES)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**EXAMPLES, labels=torch.tensor([0, 1, 0])).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(False)
    for name, gradient in gradients(True).items():
        torch.testing.assert_close(gradient, expected.pop(name), msg=lambda text, name=name: f"{name}: {text}")
    assert not expected


@torch.no_grad()
def test_encoder_of_an_encoder_decoder_model_follows_its_own_mask(monkeypatch):
    model = t5()
    examples = {**EXAMPLES, "decoder_input_ids": IDS}
    convert(model, SEQUENCE, example_inputs=examples, filter_fn=lambda module, name: name.startswith("encoder."))

    def logits(ids, mask):
        written = IDS[:1].expand(len(ids), -1)  # as long as the encoder's, so that a mix-up of masks would go unnoticed
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=written).logits

    assert spread(logits) < 1e-10
    written = model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False)
    for i, n in enumerate(LENGTHS):
        options = {"max_new_tokens": 5, "do_sample": False}
        alone = model.generate(IDS[i : i + 1, :n], attention_mask=MASK[i : i + 1, :n], **options)
        assert torch.equal(written[i, : alone.shape[1]], alone[0])
    monkeypatch.setattr(PaddingMask, "zero", lambda self, x: x)
    assert spread(logits) > 1e-6


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "LlamaModel"])
def test_documents_packed_into_one_row_are_refused(kind):
    model = llama(kind)
    convert(model, CAUSAL, example_inputs={"input_ids": IDS})
    alone = model(IDS[:1]).last_hidden_state if kind == "LlamaModel" else model(IDS[:1]).logits
    anew = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(ShapeError, match="packed into one row"):
        model(IDS[:1], position_ids=anew)
    with pytest.raises(ShapeError, match="packed into one row"):
        model(IDS[:1], attention_mask=torch.ones(1, 7, dtype=torch.long), position_ids=anew)
    plain = model(IDS[:1], position_ids=torch.arange(7)[None])
    assert torch.equal(plain.last_hidden_state if kind == "LlamaModel" else plain.logits, alone)
    apart = llama(kind)
    convert(apart, APART)
    apart(IDS[:1], position_ids=anew)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.slow), False])
def test_contrastive_training_under_checkpointing(reentrant):
    """Two calls of other padding before one backward pass."""

    def gradients(checkpointed):
        torch.manual_seed(0)
        model = bert("BertModel", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        convert(model, SEQUENCE, example_inputs=EXAMPLES)
        model.train()
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        masks = (None, MASK, torch.ones_like(MASK).tril(1))
        first, second, third = (model(IDS, attention_mask=mask).last_hidden_state[:, 0] for mask in masks)
        (first * second * third).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_threads_with_masks_of_their_own():
    model, _ = converted()
    masks = [MASK, torch.ones_like(MASK), MASK.flip(0), None]

    def call(number):
        with torch.no_grad():
            return model(IDS, attention_mask=masks[number % 4]).logits

    alone = [call(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for number, logits in enumerate(pool.map(call, range(100))):
            assert torch.equal(logits, alone[number % 4])


def test_saved_with_safetensors_a_model_keeps_what_its_numbers_mean(tmp_path):
    model, _ = converted()
    model.save_pretrained(tmp_path)
    state = pytest.importorskip("safetensors.torch").load_file(tmp_path / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    again, _ = converted()
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again(**EXAMPLES).logits, model(**EXAMPLES).logits)
    other, _ = converted(config=CAUSAL)
    with pytest.raises(RuntimeError, match=r"mixing='sequence'.*mixing='causal'"):
        other.load_state_dict(state)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_bert_follows_its_mask_and_refuses_padding_on_the_left():
    torch._dynamo.reset()
    model, done = converted()
    compiled = torch.compile(model, backend="aot_eager")
    for mask in (MASK, MASK.flip(0), None):
        expected = model(IDS, attention_mask=mask).logits
        torch.testing.assert_close(compiled(IDS, attention_mask=mask).logits, expected)
    with pytest.raises((ShapeError, RuntimeError), match="pad on the right"):
        compiled(IDS.flip(1), attention_mask=MASK.flip(1))
    with done.padding(MASK):
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_padding_of_a_source_does_not_reach_the_decoder(padded):
    """Cross-attention in the decoder is fed the encoder's rows, and no mask of its own call says which are padding."""
    model = t5()
    mask = MASK if padded else torch.ones_like(MASK)
    examples = {"input_ids": IDS, "attention_mask": mask, "decoder_input_ids": IDS[:, :5]}
    keep = lambda module, name: name.startswith("encoder.block.0") or "decoder.block.0.layer.1" in name  # noqa: E731
    done = convert(model, SEQUENCE, example_inputs=examples, filter_fn=keep)
    read = [name for name in done.converted if "EncDecAttention" in name]
    assert bool(read) is not padded
    if padded:
        junk = torch.where(MASK == 1, IDS, (IDS + 17) % VOCABULARY)
        assert torch.equal(model(**examples).logits, model(**{**examples, "input_ids": junk}).logits)
        assert "no mask of the call tells it" in done.skipped["decoder.block.0.layer.1.EncDecAttention.k"]


def test_a_mask_that_the_layers_refuse_is_found_before_anything_is_replaced():
    model = bert()
    before = dict(model.named_modules())
    with pytest.raises(ConversionError, match="pad on the right"):
        convert(model, SEQUENCE, example_inputs={"input_ids": IDS, "attention_mask": MASK.flip(1)})
    assert dict(model.named_modules()) == before


def test_causal_tiles_take_padded_examples():
    """A padding row that sees another padding row hurts nobody."""
    model = llama()
    done = convert(model, CAUSAL, example_inputs={"input_ids": IDS, "attention_mask": MASK})
    assert len(done.converted) == 14
    assert check_mixing(model, {"input_ids": IDS, "attention_mask": MASK})
