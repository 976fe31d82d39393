"""A pretend CUDA card on a machine without one: tensors that say cuda:0, whose values are on the CPU.

`PretendCard()` is a context manager. Inside it torch.cuda says that there is one card, and every tensor that is made on it or
brought to it is a `CardTensor`: for the dispatcher, autograd and autocast a CUDA tensor in all respects (so CUDA's own casts of
autocast, composite operators on their CUDA way, the autograd engine's thread of the device, foreach and fused optimisers), but
computed on the CPU, so that scripts run to their end with true values. An operator that a real card refuses is refused:

- tensors of both devices together (0-dimensional CPU tensors of pointwise operators, and CPU indices, excepted as on a card);
- a generator of the other device; numpy() of a CUDA tensor.

`syncs` lists every wait of the host for the card with the line of the project that asked for it. `operators` counts the operators
that would start kernels.
"""

import atexit
import ctypes
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.utils._foreach_utils as foreach
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten
CARD = torch.device("cuda", 0)


class CardError(RuntimeError):
    """What a card would refuse."""


class Sync(NamedTuple):
    """A wait of the host for the card."""

    operator: str
    reason: str
    place: str  # file:line of the project


# the tensor -------------------------------------------------------------------------------------------------------------


class CardTensor(torch.Tensor):
    """Says cuda:0; `values` are on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        layout |= {"dtype": values.dtype, "layout": values.layout, "device": CARD}
        made = torch.Tensor._make_wrapper_subclass(cls, values.size(), **layout)
        made.values = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_):
        return f"CardTensor({self.values!r})"

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force=False):
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, dtype=None):
        return self.numpy()

    def __reduce_ex__(self, protocol):  # what torch.load(map_location="cpu") finds
        return self.values.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad():
                copied = CardTensor(self.values.clone(memory_format=torch.preserve_format))
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        card = PretendCard.current
        if card is None:
            raise CardError(f"{func}: a tensor of the pretend card is used after its end")
        return card.run(func, args, kwargs or {})


CARD_GENERATORS: dict = {}
MARK = torch.tensor([67, 85], dtype=torch.uint8)  # before a state of the card's


def of_card(generator: torch.Generator) -> bool:
    return getattr(generator, "on_card", False) or generator._cdata in CARD_GENERATORS


class CardGenerator(torch.Generator):
    """torch.Generator that can be of the pretend card."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.on_card = torch.device(device).type == "cuda"
        if made.on_card:  # operators get another Python object of the same generator
            CARD_GENERATORS[made._cdata] = made
        return made

    @property
    def device(self):
        return CARD if self.on_card else torch.device("cpu")

    def get_state(self):
        state = super().get_state()
        # another length than the CPU's, so that states cannot be taken for each other
        return torch.cat([MARK, state]) if self.on_card else state

    def set_state(self, state):
        if isinstance(state, CardTensor):
            raise TypeError("RNG state must be a torch.ByteTensor")
        mine = torch.equal(state[:2], MARK) and len(state) == 5058
        if mine != self.on_card:
            raise CardError("RNG state is wrong size")
        super().set_state(state[2:].clone() if mine else state)
        return self


# what waits ---------------------------------------------------------------------------------------------------------------

WAITING = {
    aten._local_scalar_dense.default: "item, float, int or bool of a tensor",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.bincount.default: "bincount",
    aten.equal.default: "equal",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXING = {
    overload
    for name in ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
    for overload in (getattr(getattr(aten, name), kind) for kind in getattr(aten, name).overloads())
}
# operators that start no kernel though they are no views by their schema
NO_KERNEL = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten._local_scalar_dense.default,
    aten._unsafe_view.default,
    aten.lift_fresh.default,
    aten._reshape_alias.default,
    aten.set_.source_Tensor,
}
# take 0-dimensional CPU tensors beside CUDA ones without being pointwise
SCALARS_WELCOME = {
    aten.copy_.default,
    aten.fill_.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._foreach_mul_.Tensor,
    aten._foreach_add_.Tensor,
    aten._foreach_div_.Tensor,
}


def is_view(func) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def cudnn_batch_norm(input, weight, bias, mean, var, training, momentum, eps):
    out = torch.native_batch_norm(input, weight, bias, mean, var, training, momentum, eps)
    return (*out, torch.empty(0, dtype=torch.uint8))


def cudnn_batch_norm_backward(input, grad, weight, mean, var, save_mean, save_var, eps, reserve):
    return aten.native_batch_norm_backward(
        grad, input, weight, mean, var, save_mean, save_var, True, eps, [True] * 3
    )


ON_CPU = {  # operators that CPUs have not
    aten.cudnn_batch_norm.default: cudnn_batch_norm,
    aten.cudnn_batch_norm_backward.default: cudnn_batch_norm_backward,
}


# the card -----------------------------------------------------------------------------------------------------------------


class PretendCard(TorchDispatchMode):
    """See the module. root: the project; `syncs` names its lines.

    float64: whether the card has it. On a card without it, as MPS, an operator that returns float64 is refused.
    """

    current: "PretendCard | None" = None

    def __init__(self, root: Path, float64: bool = True):
        super().__init__()
        self.root, self.float64, self.forbid_syncs = str(root), float64, False
        self.syncs: list[Sync] = []
        self.operators: Counter = Counter()  # that start kernels
        self.notes: Counter = Counter()

    # entering and leaving

    def __enter__(self):
        let_autograd_believe()
        self._undone = ExitStack()
        for owner, name, value in stand_ins(self):
            patch(self._undone, owner, name, value)
        # Module.to makes new parameters, since a plain one cannot become a CardTensor in place
        future = torch.__future__
        self._undone.callback(
            future.set_overwrite_module_params_on_conversion,
            future.get_overwrite_module_params_on_conversion(),
        )
        future.set_overwrite_module_params_on_conversion(True)
        # torch.tensor(..., device=) makes a CPU tensor first and lets a mode move it, as under FakeTensorMode
        self._undone.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        PretendCard.current = self
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        PretendCard.current = None
        self._undone.close()

    @contextmanager
    def no_syncs(self) -> Iterator[None]:
        """Inside it a wait for the card is an error."""
        self.forbid_syncs, before = True, self.forbid_syncs
        try:
            yield
        finally:
            self.forbid_syncs = before

    # operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        if func is torch.ops.prim.device.default:
            return CARD
        flat, spec = tree_flatten((args, kwargs))
        ours = [a for a in flat if isinstance(a, CardTensor)]
        wanted = kwargs.get("device")
        to_card = wanted is not None and torch.device(wanted).type == "cuda"
        if not ours and not to_card:
            self._check_generator(func, kwargs, False)
            if isinstance(wanted, (str, torch.device)) or wanted is None:
                return func(*args, **kwargs)
        if to_card and torch.device(wanted).index not in (None, 0):
            raise CardError(f"{func}: on {wanted}, the card is {CARD}")
        to_cpu = wanted is not None and not to_card
        on_card = (bool(ours) and not to_cpu) or to_card
        plain = [a for a in flat if isinstance(a, torch.Tensor) and not isinstance(a, CardTensor)]
        if ours:
            self._check_devices(func, args, plain)
        if on_card:
            self._check_generator(func, kwargs, True)
        self._note_sync(func, args, kwargs, bool(ours), to_card, to_cpu)

        on_cpu = {"device": torch.device("cpu"), "pin_memory": False}
        kwargs = kwargs | {name: on_cpu[name] for name in on_cpu.keys() & kwargs.keys() if kwargs[name]}
        flat, spec = tree_flatten((args, kwargs))
        inner_args, inner_kwargs = tree_unflatten(
            [a.values if isinstance(a, CardTensor) else a for a in flat], spec
        )
        out = ON_CPU.get(func, func)(*inner_args, **inner_kwargs)
        self._check_type(func, out, on_card)
        if on_card and not is_view(func) and func not in NO_KERNEL:
            self.operators[str(func)] += 1
        given = {id(a.values): a for a in ours}
        if func is aten.copy_.default and not isinstance(args[0], CardTensor):
            return args[0]
        if to_cpu or func is aten._local_scalar_dense.default:
            return out

        def wrapped(value: torch.Tensor) -> torch.Tensor:
            if id(value) in given:
                return given[id(value)]
            return value if isinstance(value, CardTensor) else CardTensor(value)

        return tree_map_only(torch.Tensor, wrapped, out)

    def _check_devices(self, func, args, plain) -> None:
        if func in COPIES or not plain:
            return
        if func in INDEXING and isinstance(args[0], CardTensor):
            index = [i for i in args[1] if i is not None and not isinstance(i, CardTensor)]
            plain = [p for p in plain if all(p is not i for i in index)]
        scalars = torch.Tag.pointwise in func.tags or func in SCALARS_WELCOME
        for tensor in plain:
            if tensor.dim() > 0 or not scalars:
                raise CardError(
                    f"{func}: Expected all tensors to be on the same device, but found cuda:0 and cpu "
                    f"({list(tensor.shape)} {tensor.dtype}) at {self.place()}"
                )

    def _check_type(self, func, out, on_card: bool) -> None:
        if self.float64 or not on_card:
            return
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_flatten(out)[0]):
            raise CardError(f"{func}: this card has no float64, at {self.place()}")

    def _check_generator(self, func, kwargs, on_card: bool) -> None:
        generator = kwargs.get("generator")
        if generator is not None and of_card(generator) != on_card:
            expected, found = ("cuda", "cpu") if on_card else ("cpu", "cuda")
            raise CardError(
                f"{func}: Expected a '{expected}' device type for generator but found '{found}' at {self.place()}"
            )

    def _note_sync(self, func, args, kwargs, ours: bool, to_card: bool, to_cpu: bool) -> None:
        reason = WAITING.get(func) if ours else None
        if func is aten._to_copy.default:
            source, blocking = args[0], not kwargs.get("non_blocking")
            if isinstance(source, CardTensor) and to_cpu:
                reason = "copy to the CPU" if blocking else None
            elif not isinstance(source, CardTensor) and to_card:
                reason = self._upload(source, blocking)
        elif func is aten.copy_.default:
            target, source = args[:2]
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            if isinstance(target, CardTensor) and not isinstance(source, CardTensor):
                reason = self._upload(source, blocking)
            elif isinstance(source, CardTensor) and not isinstance(target, CardTensor):
                reason = "copy to the CPU"
        elif func in INDEXING and isinstance(args[0], CardTensor):
            index = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) and isinstance(i, CardTensor) for i in index):
                put = "put" in func._schema.name
                if not (put and args[2].numel() == 1 and len(index) == 1):  # that is a masked_fill
                    reason = "index by a mask"
            elif any(not isinstance(i, CardTensor) for i in index):
                reason = "index on the CPU, copied to the card"
        if reason is None:
            return
        found = Sync(str(func).removeprefix("aten."), reason, self.place())
        if self.forbid_syncs:
            raise CardError(f"the host waits for the card: {found.operator} ({reason}) at {found.place}")
        self.syncs.append(found)

    def _upload(self, source: torch.Tensor, blocking: bool) -> str | None:
        if blocking:
            return "copy to the card, blocking"
        if not getattr(source, "pretend_pinned", False):
            self.notes["non_blocking copy from memory that is not pinned at " + self.place()] += 1
        return None

    def place(self) -> str:
        """file:line of the innermost line of the project that is being run; the engine's thread has none."""
        frame = sys._getframe(1)
        while frame is not None:
            folder, _, file = frame.f_code.co_filename.partition(f"{self.root}/")
            if file and not folder and not file.startswith((".venv/", "tests/")):
                return f"{file}:{frame.f_lineno}"
            frame = frame.f_back
        return "backward"


# making torch believe ---------------------------------------------------------------------------------------------------

_kept: list = []
HAS_PRIMARY_CONTEXT = 4  # its number in the table of virtual functions of AcceleratorHooksInterface


def let_autograd_believe() -> None:
    """Backward passes of CUDA tensors in a CUDA build of torch without a driver.

    torch has a guard for fake CUDA devices (FakeTensorMode asks for it too), but its autograd engine asks the CUDA hooks whether
    device 0 is in use, and they raise where there is no driver. The hooks object gets a copy of its table of virtual functions
    in which that one answers yes while a card is pretended, up to the end of the process.

    To be called before the first backward pass of a process, in conftest.py say: with it the engine makes its threads, one for
    each device that it knows of then.
    """
    if _kept:
        return
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
    hooks = library._ZN2at6detail12getCUDAHooksEv
    hooks.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(hooks())
    size, ahead = 128, 2  # entries; before the first of them stand two words
    word = ctypes.sizeof(ctypes.c_void_p)
    copy = (ctypes.c_void_p * (size + ahead))(
        *(ctypes.c_void_p * (size + ahead)).from_address(table.value - ahead * word)
    )
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(
        lambda this, index: PretendCard.current is not None
    )
    copy[ahead + HAS_PRIMARY_CONTEXT] = ctypes.cast(answer, ctypes.c_void_p).value
    atexit.register(setattr, table, "value", table.value)  # the copy is gone before the hooks are
    table.value = ctypes.addressof(copy) + ahead * word
    torch._C._ensureCUDADeviceGuardSet()
    _kept.extend((answer, copy))


def patch(undone: ExitStack, owner: Any, name: str, value: Any) -> None:
    before = owner.__dict__.get(name, undone) if isinstance(owner, type) else getattr(owner, name, undone)
    undone.callback(lambda: delattr(owner, name) if before is undone else setattr(owner, name, before))
    setattr(owner, name, value)


class _Event:
    """Events have happened when they are recorded."""

    def __init__(self, enable_timing=False, **_):
        self.timing, self.time = enable_timing, None

    def record(self, stream=None):
        self.time = time.perf_counter()

    def elapsed_time(self, other) -> float:
        if not (self.timing and other.timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.time is None or other.time is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return 1000 * (other.time - self.time)

    def synchronize(self):
        pass

    def query(self):
        return True


def graphed(callables, sample_args, num_warmup_iters=3, **_):
    """What make_graphed_callables does to a module, with its checks, three passes of warm-up, and static output buffers.

    A replay writes into the same output and gradient tensors as the one before it, as on a card.
    """
    module = callables
    if torch.is_autocast_enabled() and torch.is_autocast_cache_enabled():
        raise RuntimeError(
            "make_graphed_callables does not support the autocast caching. Please set `cache_enabled=False`."
        )
    assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
    assert all(not b.requires_grad for b in module.buffers())
    parameters, original, trains = tuple(module.parameters()), module.forward, module.training
    card = PretendCard.current
    with card.no_syncs():
        for _ in range(num_warmup_iters):
            outs = original(*sample_args)
            trained = [p for p in parameters if p.requires_grad]
            torch.autograd.grad(outs, trained, [torch.empty_like(out) for out in outs])
    static = SimpleNamespace(
        inputs=sample_args,
        outs=[torch.empty_like(out.detach()) for out in outs],
        grads=[torch.empty_like(p) for p in parameters],
        graph=None,
    )

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            given, parameters = tensors[: len(static.inputs)], tensors[len(static.inputs) :]
            for kept, new in zip(static.inputs, given, strict=True):
                if new.shape != kept.shape or new.dtype != kept.dtype:
                    raise CardError("a graph is replayed with an input of another shape or type")
                kept.copy_(new)
            with torch.enable_grad(), card.no_syncs():
                leaves = [p.detach().requires_grad_() for p in parameters]
                state = dict(zip([n for n, _ in module.named_parameters()], leaves, strict=True))
                standing, module.forward = module.forward, original
                try:
                    live = torch.func.functional_call(module, state, tuple(i.detach() for i in static.inputs))
                finally:
                    module.forward = standing
            static.graph = (live, leaves)
            for kept, new in zip(static.outs, live, strict=True):
                kept.copy_(new.detach())
            return tuple(out.detach() for out in static.outs)

        @staticmethod
        def backward(ctx, *gradients):
            live, leaves = static.graph
            cast = [own.to(out.dtype) for own, out in zip(gradients, live, strict=True)]
            found = torch.autograd.grad(live, leaves, cast)
            with torch.no_grad():
                for kept, new in zip(static.grads, found, strict=True):
                    kept.copy_(new)
            return *(None for _ in static.inputs), *(g.detach() for g in static.grads)

    def new_forward(*images):
        if module.training != trains:
            return original(*images)
        return Graphed.apply(*images, *parameters)

    module.forward = new_forward
    return module


def stand_ins(card: PretendCard):
    """(owner, name, what stands there) for all of torch that would ask a driver."""
    cuda = torch.cuda
    stream = SimpleNamespace(wait_stream=lambda *_: None, synchronize=lambda: None, device=CARD)

    def set_states(new):
        if any(isinstance(state, CardTensor) or state.dtype != torch.uint8 for state in new):
            raise TypeError("RNG state must be a torch.ByteTensor")
        if len(new) > 1:
            raise IndexError("there is one card")

    def synchronize(device=None):
        card.syncs.append(Sync("torch.cuda.synchronize", "asked for", card.place()))

    def check(device=None):
        index = device.index if isinstance(device, torch.device) else device
        if index:
            raise AssertionError("Invalid device id")
        return f"pretend card {index or 0}"

    def pinned(tensor, device=None):
        copied = tensor.clone(memory_format=torch.preserve_format)
        copied.pretend_pinned = True
        return copied

    yield from (
        (cuda, "is_available", lambda: True),
        (cuda, "device_count", lambda: 1),
        (cuda, "current_device", lambda: 0),
        (cuda, "set_device", lambda device: check(device) and None),
        (cuda, "is_initialized", lambda: True),
        (cuda, "_lazy_init", lambda: None),
        (cuda, "is_bf16_supported", lambda *a, **k: True),
        (cuda, "get_device_name", check),
        (cuda, "get_device_capability", lambda device=None: (9, 0)),
        (cuda, "synchronize", synchronize),
        (cuda, "max_memory_allocated", lambda device=None: 2**20),
        (cuda, "get_rng_state_all", lambda: [torch.zeros(16, dtype=torch.uint8)]),
        (cuda, "set_rng_state_all", set_states),
        (cuda, "manual_seed_all", lambda seed: None),
        (cuda, "manual_seed", lambda seed: None),
        (cuda, "Event", _Event),
        (cuda, "current_stream", lambda device=None: stream),
        (cuda, "is_current_stream_capturing", lambda: False),
        (cuda, "make_graphed_callables", graphed),
        (torch, "Generator", CardGenerator),
        (torch.Tensor, "pin_memory", pinned),
        (torch.Tensor, "is_pinned", lambda self, device=None: getattr(self, "pretend_pinned", False)),
        (torch.accelerator, "is_available", lambda: True),
        (torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")),
        (torch.accelerator, "set_device_index", lambda index: None),
        (torch.accelerator, "current_device_index", lambda: 0),
    )

    for module in (optimizer, foreach):
        if hasattr(module, "_foreach_supported_types"):
            yield module, "_foreach_supported_types", [*module._foreach_supported_types, CardTensor]


def usable() -> bool:
    """Whether a card can be pretended: no real one is there, and torch is a CUDA build."""
    return torch.version.cuda is not None and not torch.cuda.is_available()
