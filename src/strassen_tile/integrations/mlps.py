"""`fuse_mlps`: blocks of known classes become `STLMLP`s that hold the same layers under the same names."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from strassen_tile.convert.replace import replace_modules
from strassen_tile.convert.running import generators_kept
from strassen_tile.errors import ConversionError
from strassen_tile.nn import STLMLP, Roles, STLConfig, STLLinear
from strassen_tile.nn.config import Mixing
from strassen_tile.nn.fusion import has_own_hooks
from strassen_tile.nn.mlp import why_apart
from strassen_tile.ops.linear import ACTIVATIONS

_GATED = Roles(up="up_proj", down="down_proj", gate="gate_proj", activation="act_fn")
_PLAIN = Roles(up="fc1", down="fc2", activation="activation_fn")

# Class of a block → what its children do. A name here is a name to try: each block is run before it is replaced.
BLOCKS: dict[str, Roles] = {
    "transformers.models.gemma.modeling_gemma.GemmaMLP": _GATED,
    "transformers.models.gemma2.modeling_gemma2.Gemma2MLP": _GATED,
    "transformers.models.gemma3.modeling_gemma3.Gemma3MLP": _GATED,
    "transformers.models.llama.modeling_llama.LlamaMLP": _GATED,
    "transformers.models.mistral.modeling_mistral.MistralMLP": _GATED,
    "transformers.models.olmo2.modeling_olmo2.Olmo2MLP": _GATED,
    "transformers.models.qwen2.modeling_qwen2.Qwen2MLP": _GATED,
    "transformers.models.qwen3.modeling_qwen3.Qwen3MLP": _GATED,
    "transformers.models.smollm3.modeling_smollm3.SmolLM3MLP": _GATED,
    "transformers.models.clip.modeling_clip.CLIPMLP": _PLAIN,
    "transformers.models.dinov2.modeling_dinov2.Dinov2MLP": _PLAIN,
    "transformers.models.phi.modeling_phi.PhiMLP": _PLAIN,
    "transformers.models.siglip.modeling_siglip.SiglipMLP": _PLAIN,
    "transformers.models.siglip2.modeling_siglip2.Siglip2MLP": _PLAIN,
    "transformers.models.vit.modeling_vit.ViTMLP": _PLAIN,
    "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXMLP": Roles(
        up="dense_h_to_4h", down="dense_4h_to_h", activation="act"
    ),
    "strassen_tile.models.layers.Mlp": Roles(up="fc1", down="fc2", activation="act"),
}
# An activation's class → its name in `STLMLP`. Activations that only come close (gelu_new, quick_gelu) are not among them.
_ACTIVATIONS = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
}
_FUNCTIONS = ((torch.relu, "relu"), (F.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))


@dataclass
class Fusion:
    """What `fuse_mlps` did to a model.

    Attributes:
        fused: name → the `STLMLP` now there.
        skipped: name → why the block of that name, of a known class, was left as it is.
    """

    fused: dict[str, STLMLP]
    skipped: dict[str, str]
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the original blocks back; the layers, which they share with the `STLMLP`s, are as trained by then.

        To have dense layers again, undo the conversion too.
        """
        for action in self._undo:
            action()
        self._undo.clear()

    def __str__(self) -> str:
        rows = [(name, f"STLMLP, {mlp.extra_repr()}", "") for name, mlp in self.fused.items()]
        rows += [(name, "left as it is", reason) for name, reason in self.skipped.items()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{name:<{widths[0]}}  {what:<{widths[1]}}  {why}".rstrip() for name, what, why in rows]
        return "\n".join([f"{len(self.fused)} fused, {len(self.skipped)} left as they are", *lines])


def fuse_mlps(model: nn.Module, roles: Mapping[type[nn.Module], Roles] | None = None) -> Fusion:
    """Replace the MLP blocks of a converted model, in place, by `STLMLP`s: in inference on a GPU each is one operator.

    Call it after `convert`. An `STLMLP` holds the layers of its block, the very objects, under their names: parameters, state
    dict, training, results and padding masks stay as they are. What is lost is whatever else the block has (its `config`,
    or `block[0]` of an `nn.Sequential`), should a model ask for it.

    A block is replaced if it is of a known class (`BLOCKS`; `nn.Sequential(Linear, activation, Linear)`), and if, run on
    random inputs, it computes what the `STLMLP` does. Derived classes may compute something else: name them in `roles`.

    Args:
        model: holds `STLLinear`s.
        roles: further classes of blocks, exact ones; they go before the known ones.

    Returns:
        A `Fusion`; `str()` of it is a table.

    Raises:
        ConversionError: nothing was fused, or `roles` names a class of which the model has no block. The model is then as
            it was.
    """
    if not isinstance(roles, Mapping | None):
        raise ConversionError(f"roles must be {{class of a block: Roles(…)}}; got {roles!r}")
    roles = dict(roles or {})
    for kind, given in roles.items():
        if not isinstance(kind, type) or not issubclass(kind, nn.Module) or not isinstance(given, Roles):
            raise ConversionError(f"roles must be {{class of a block: Roles(…)}}; got {kind!r}: {given!r}")
        if all(type(module) is not kind for module in model.modules()):
            raise ConversionError(f"roles: {type(model).__name__} has no block of the exact class {kind.__name__}")
    fused: dict[str, STLMLP] = {}
    skipped: dict[str, str] = {}
    with generators_kept(model):
        stand_in = functools.cache(_stand_in)
        for name, block in model.named_modules():
            known = _roles_of(block, roles)
            if known is None:
                continue
            if not name:
                made: STLMLP | str = "it is the model itself: build STLMLP.from_layers of its layers"
            else:
                made = known if isinstance(known, str) else _fuse(block, known, stand_in)
            if isinstance(made, str):
                skipped[name] = made
            else:
                fused[name] = made
    if not fused:
        listing = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in skipped.items())
        raise ConversionError(
            f"nothing to fuse in {type(model).__name__}: "
            + (listing or "no block of a known class; name yours with roles={MyMLP: Roles(up=…, down=…, …)}")
        )
    return Fusion(fused, skipped, [replace_modules(model, fused)])


def _roles_of(block: nn.Module, given: Mapping[type[nn.Module], Roles]) -> Roles | str | None:
    """What the children of the block do; or why that is not known, though the class looks like it; or None."""
    if type(block) in given:
        return given[type(block)]
    if isinstance(block, nn.Sequential):
        found = _roles_of_sequential(block)
    else:
        found = next((BLOCKS[name] for name in map(_name_of, type(block).__mro__) if name in BLOCKS), None)
    if found is None or type(block) is nn.Sequential or _name_of(type(block)) in BLOCKS:
        return found
    kind = type(block).__name__
    return (
        f"{kind} is derived from a known class and may compute something else; name it with roles={{{kind}: Roles(…)}}"
    )


def _roles_of_sequential(block: nn.Sequential) -> Roles | None:
    children = block._modules.items()  # of which one may be there twice
    parts = {name: part for name, part in children if not isinstance(part, _DropoutNd | nn.Identity | None)}
    linear = [isinstance(part, nn.Linear | STLLinear) for part in parts.values()]
    if linear != [True, False, True]:
        return None
    up, activation, down = parts
    return None if list(parts[activation].parameters()) else Roles(up, down, activation=activation)


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _fuse(block: nn.Module, roles: Roles, stand_in: Callable[..., STLLinear]) -> STLMLP | str:
    """The `STLMLP` that can take the block's place, or why none can."""
    children = dict(block.named_children())
    for name in roles.layers:
        if name not in children:
            return f"it has no layer {name}"
        if type(children[name]) is not STLLinear:
            return f"{name} is of class {type(children[name]).__name__}, not STLLinear"
    layers = {name: child for name, child in children.items() if name in roles.layers}
    if (apart := why_apart([layers[name] for name in roles.layers])) is not None:
        return apart
    activation = roles.activation
    if activation not in ACTIVATIONS:
        function = getattr(block, activation, None)
        if (known := _activation(function)) is None:
            return f"its activation {activation} is {function}; STLMLP knows {', '.join(ACTIVATIONS)}"
        roles = roles._replace(activation=known)
    inside = {part for layer in layers.values() for part in layer.modules()}
    for part in block.modules():
        if isinstance(part, _DropoutNd) and part.p > 0:
            return f"its dropout (p={part.p:g}) acts in training; set p = 0 first if it is not to be trained"
        if part not in inside and (
            has_own_hooks(part) or any(v for k, v in vars(part).items() if k.endswith("_hooks"))
        ):
            return "it has hooks, or a forward of its own, which would be lost"
    if len(inspect.signature(block.forward).parameters) != 1:
        return "its forward takes more than one tensor"
    try:
        mlp = STLMLP.from_layers(layers, roles)
        mlp.training = block.training
        if more := sorted(_tensors(block) - _tensors(mlp)):
            return f"it has parameters or buffers beside those of its layers: {', '.join(more)}"
        return _differs(block, roles, stand_in) or mlp
    except Exception as error:  # somebody else's forward, on inputs it was not written for
        return f"it could not be run on random inputs ({type(error).__name__}: {error})"


def _activation(function: object) -> str | None:
    """The name of an activation, a module or a function; None for one that `STLMLP` does not have."""
    if type(function) is nn.GELU:
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    named = next((name for known, name in _FUNCTIONS if known is function), None)
    return _ACTIVATIONS.get(_name_of(type(function)), named)


def _tensors(module: nn.Module) -> set[str]:
    return {*module.state_dict(), *(name for name, _ in module.named_buffers())}


def _differs(block: nn.Module, roles: Roles, stand_in: Callable[..., STLLinear]) -> str | None:
    """What the block computes that an `STLMLP` of the roles does not, or None.

    Both are run, in either mode, on a copy of the block whose layers are small random ones in float64. So the block and
    its weights are not touched, and neither their precision nor a weight of zeros hides a difference.
    """
    doubles = {}
    for role, name in enumerate(roles.layers):
        layer: STLLinear = getattr(block, name)
        p, mixing = layer.config.pqs[0], layer.config.mixing
        doubles[name] = stand_in(role, layer.in_features, layer.out_features, layer.bias is not None, p, mixing)
    twin = copy.deepcopy(block, {id(getattr(block, name)): double for name, double in doubles.items()})
    mlp = STLMLP.from_layers(doubles, roles)
    up = doubles[roles.up]
    x = 2 * torch.randn(2, up.config.pqs[0] + 1, up.in_features, dtype=torch.float64, device="cpu")
    for training in (False, True):
        with torch.no_grad():
            found, expected = twin.train(training)(x.clone()), mlp.train(training)(x.clone())
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return "its output is not of the shape (…, N, M)"
        difference = float((found - expected).norm() / expected.norm())
        if not difference < 1e-9:
            formula = "down(act(up(x)))" if roles.gate is None else "down(act(gate(x))·up(x))"
            mode = "training" if training else "eval"
            return f"it does not compute {formula} in {mode} mode: {difference:.1e} of the norm apart on random inputs"
    return None


def _stand_in(role: int, in_features: int, out_features: int, bias: bool, p: int, mixing: Mixing) -> STLLinear:
    """A layer of those features that mixes rows likewise, of the least rank; another one for each role."""
    config = STLConfig(tile=(p, 4, 4), rank=p, mixing=mixing)
    with torch.device("cpu"):
        torch.default_generator.manual_seed(role)
        return STLLinear(in_features, out_features, bias, config=config, dtype=torch.float64)
