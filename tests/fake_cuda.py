"""A fake CUDA device, whose tensors have no content. It shows if code mixes devices or makes the host wait."""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import l2_attention, routed

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda", 1)  # not the current one, which is 0
KERNELS = {
    routed: ("up_kernel", "down_kernel", "down_backward_kernel", "weight_gradient_kernel"),
    l2_attention: ("forward_kernel", "query_backward_kernel", "key_backward_kernel"),
}
aten = torch.ops.aten


class FakeCuda(TorchDispatchMode):
    """The device. `waits` collects operations that make the host wait for it, {"operation, file:function"}.

    The host would also wait if the size of a result depended on the content, as that of nonzero: such an operation
    raises.

    Autograd asks the driver for the streams of CUDA tensors. So C++ finds the tensors on meta, and Python finds them on
    CUDA. Autocast is in C++, so it casts nothing here.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.current = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return torch.device("meta") if args[0].fake_device.type == "cuda" else args[0].fake_device
        if kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = DEVICE
        devices = [leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if func in (aten._local_scalar_dense.default, aten.equal.default):  # item(), int(), bool(), …
            self.note(func.overloadpacket.__name__, wait="cuda" in devices)
            return 0.0 if args[0].is_floating_point() else 0
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            how = ", non_blocking" if kwargs.get("non_blocking") else ""
            self.note(f"{devices[-1]} to {out.device.type}{how}", wait=devices[-1] != out.device.type)
        elif func in (aten.index.Tensor, aten.index_put_.default):  # indices on the CPU are copied
            self.note("index", wait=len(set(devices)) > 1)
        return out

    def note(self, operation, wait):
        if not wait:
            return
        frame = sys._getframe()
        while (path := Path(frame.f_code.co_filename)) == Path(__file__) or not is_ours(path):
            frame = frame.f_back
        self.waits.add(f"{operation}, {path.relative_to(ROOT).as_posix()}:{frame.f_code.co_name}")

    def exchange(self, index):
        """Replaces the function that torch.cuda.device calls → the former device."""
        former, self.current = self.current, self.current if index < 0 else index
        return former

    def launch(self, *args, **options):
        """Replaces the launch of a Triton kernel."""
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        assert {x.device for x in tensors} == {DEVICE}
        backward = torch._C._current_graph_task_id() != -1  # there autograd sets the current device
        assert backward or self.current == DEVICE.index
        assert all(x.is_contiguous() for x in tensors)


def is_ours(path):
    return path.is_relative_to(ROOT) and ".venv" not in path.parts


@contextlib.contextmanager
def fake_cuda(replace=None):
    """Activates a FakeCuda. Tensors on other devices, the CPU included, are fake as well.

    replace: a Triton kernel → its replacement; by default, FakeCuda.launch replaces all kernels.
    """
    device, launcher = FakeCuda(), mock.MagicMock()
    launcher.__getitem__.return_value = device.launch
    with contextlib.ExitStack() as stack:
        for name, value in {
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda: True,
            "torch.cuda._exchange_device": device.exchange,
            "torch.cuda._maybe_exchange_device": device.exchange,
        }.items():
            stack.enter_context(mock.patch(name, value))
        for name, value in {
            "is_cuda": property(lambda x: x.device.type == "cuda"),
            "get_device": lambda x: x.device.index,
            "__format__": lambda x, spec: format(x.item(), spec),
        }.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, value))
        for module, names in KERNELS.items():
            launched = {name: replace(getattr(module, name)) if replace else launcher for name in names}
            stack.enter_context(mock.patch.multiple(module, **launched))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # in C++, an index [[0]] becomes a tensor
        yield stack.enter_context(device)
