"""A card that is none: for a block, tensors say that they lie on a GPU, while their numbers lie here.

What a GPU refuses is refused: tensors of two places in one call, unless they have no axes; numpy. What it would be waited for is noted. The way back and the
optimizer's arithmetic are torch's own, and not looked at; nor is precision.
"""
from contextlib import contextmanager
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CARD, T = torch.device("cuda", 0), torch.Tensor
WAITS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select", "cpu", "equal", "unique")
UNSEEN = ("__get__", "__set__", "backward", "_fused_adamw_")
NOTES: list[str] = []
_quiet = [0]

class Elsewhere(RuntimeError): "Tensors of two places in one call."

class _Card:
    device, is_cuda, is_cpu = CARD, True, False
    def numpy(self, *_, **__): raise TypeError("a tensor on a card is no numpy array")
    __array__ = numpy
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None): return _called(func, args, kwargs or {})

class Lying(_Card, T): "A tensor that says so."
class Learned(_Card, torch.nn.Parameter): "A parameter that does."

def there(x) -> bool: return isinstance(x, _Card)
def _is_card(d) -> bool: return isinstance(d, (str, torch.device)) and torch.device(d).type == "cuda"

def _wanted(func, args: tuple, kwargs: dict):
    "Where a call wants its result, if it says so."
    if func is T.cpu: return "cpu"
    if func is T.to and (d := next((a for a in args[1:] if isinstance(a, (str, torch.device, T))), None)) is not None: return d.device if isinstance(d, T) else d
    return kwargs.get("device")

def _note(func, name: str, args: tuple, want, here: bool) -> None:
    masked = name in ("__getitem__", "__setitem__") and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if isinstance(x, T))
    if here and (name in WAITS or masked): NOTES.append("mask" if masked else name)
    if func is torch.tensor and _is_card(want) and args[0] != []: NOTES.append("tensor")      # one of numbers is a copy

def _called(func, args: tuple, kwargs: dict):
    tensors, name, want = [x for x in tree_leaves((args, kwargs)) if isinstance(x, T)], getattr(func, "__name__", ""), _wanted(func, args, kwargs)
    here = any(map(there, tensors))
    if not _quiet[0] and name not in UNSEEN:
        if here and func not in (T.to, T.cpu, T.copy_) and any(not there(x) and x.dim() for x in tensors): raise Elsewhere(f"{name} of {[tuple(x.shape) for x in tensors]}")
        _note(func, name, args, want, here)
    if _is_card(want):
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        if func is T.to: args = tuple("cpu" if _is_card(a) else a for a in args)
    lies = _is_card(want) if want is not None else here
    with torch._C.DisableTorchFunctionSubclass():
        def told(x): return x if not isinstance(x, T) or there(x) == lies else x.as_subclass(Lying if lies else T)
        return tree_map(told, func(*args, **kwargs))

class _Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None): return _called(func, args, kwargs or {})

def _silent(f):
    def quiet(*args, **kwargs):
        _quiet[0] += 1
        try: return f(*args, **kwargs)
        finally: _quiet[0] -= 1
    return quiet

def _carried(model, plain, *args, **kwargs):
    "`Module.to`, which changes a parameter in place."
    if not (args and _is_card(args[0])): return plain(model, *args, **kwargs)
    for m in model.modules():
        for kind, held in ((Learned, m._parameters), (Lying, m._buffers)):
            for x in held.values():
                if x is not None and not there(x): x.__class__ = kind
    return model

@contextmanager
def pretended(m, *modules):     # pytest's monkeypatch; modules that make an accelerator
    "For a block: this process has a card, and trains on it."
    def accelerator(*_):
        AcceleratorState._reset_state(reset_partial_state=True)
        acc = Accelerator(cpu=True)
        for state in (PartialState, AcceleratorState): state._shared_state["device"] = CARD
        return acc
    to, checkpoint = torch.nn.Module.to, torch.utils.checkpoint.checkpoint
    m.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: _carried(self, to, *args, **kwargs))
    m.setattr(T, "pin_memory", lambda self: self)
    m.setattr("seqwarm.core.memory.checkpoint", lambda *args, **how: checkpoint(*args, determinism_check="none", **how))     # it compares devices, on the way back
    for owner, name in ((T, "backward"), (torch.autograd, "grad"), (torch.autograd, "backward")): m.setattr(owner, name, _silent(getattr(owner, name)))
    for module in modules: m.setattr(module, "_accelerator", accelerator)
    NOTES.clear()
    try:
        with _Mode(): yield
    finally: AcceleratorState._reset_state(reset_partial_state=True)
