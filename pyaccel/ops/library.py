"""How an operator is registered: schema, kernels, fake, autograd, and a fallback that says so before it runs.

`torch.library.Library(...).define/impl`, not the `custom_op` decorator: its wrapper costs about ten times the call. For the
same reason autograd is a kernel of our own on the Autograd key: what `torch.library.register_autograd` puts there reads
the schema again at every call, which takes as long as the rest of a small one.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import _C
from torch.autograd import forward_ad

from pyaccel import extension

library = torch.library.Library("pyaccel", "DEF")


def register(
    schema: str,
    *,
    kernel: Callable | None,
    fake: Callable,
    fallback: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    differentiable: bool = True,
) -> Callable:
    """Define `pyaccel::<schema>` and return its default overload.

    `kernel` runs on the devices that the compiled module has kernels for; on any other device `fallback` (plain torch)
    runs, after one warning that says why; `kernel=None`: it runs everywhere, as there is nothing faster. `backward=None`: the operator is itself a gradient (or its output is bits),
    and differentiating it is refused. `differentiable=False`: of integers, without a gradient; a call costs less. An
    operator that writes to an argument (`Tensor(a!)`) has no autograd at all. Forward mode is refused, as is differentiating
    a gradient. The schema has neither default values nor keyword-only arguments: every call gives everything.
    """
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if kernel is not None and extension._C is not None:
        library.impl(name, kernel, "CPU")
        if extension.has_cuda():
            library.impl(name, kernel, "CUDA")
    library.impl(name, fallback if kernel is None else _warned(name, fallback), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyaccel::{name}", fake, lib=library)
    op = getattr(torch.ops.pyaccel, name).default
    if not differentiable or "!" in schema:
        return op
    if backward is None:
        setup_context, backward = None, _refuse_double_backward(name)
    library.impl(name, _autograd(name, op, setup_context, backward), "Autograd", with_keyset=True)
    return op


def _autograd(name: str, op: Callable, setup_context: Callable | None, backward: Callable) -> Callable:
    """The kernel for the Autograd key: records a node where an argument requires grad, and goes on to the device's kernel."""
    redispatch, below, after = op.redispatch, _C._AutoDispatchBelowAutograd, _C._after_autograd_keyset

    def forward(ctx, *args):
        *args, keyset = args  # last, so that arguments and `needs_input_grad` have the same positions
        with below():
            output = redispatch(keyset & after, *args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    def gradients(ctx, *grads):
        found = backward(ctx, *grads)
        return (*found, None) if isinstance(found, tuple) else (found, None)

    node = type(f"pyaccel::{name}", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(gradients)})
    record = node.apply

    def run(keyset, *args):
        if forward_ad._current_level >= 0:
            _refuse_forward_mode(name, args)
        if _C.is_grad_enabled() and _C._any_requires_grad(*args):
            return record(*args, keyset)
        with below():
            return redispatch(keyset & after, *args)

    return run


def _refuse_forward_mode(name: str, args: tuple) -> None:
    if any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise NotImplementedError(
            f"pyaccel::{name} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad). Use backward(), or the "
            "plain-torch twins in pyaccel.reference."
        )


def _refuse_double_backward(name: str) -> Callable:
    def backward(ctx, *grads):
        raise NotImplementedError(
            f"pyaccel::{name} cannot be differentiated: it is a gradient already, and spikes have no second derivative, or its "
            "output is bits. Call backward() without create_graph=True, or use the plain-torch twins in pyaccel.reference."
        )

    return backward


def _warned(name: str, fallback: Callable) -> Callable:
    @functools.wraps(fallback)
    def run(*args):
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        warn_once(device)
        with _recording():
            return fallback(*args)

    return run


def _recording():
    """Lets autograd record inside an operator's kernel, where torch excludes its keys: a gradient's fallback differentiates the twin."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradOther", "AutogradNestedTensor", "AutogradCPU", "AutogradCUDA", "AutogradMPS", "AutogradXPU"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


@functools.cache
def warn_once(device: str) -> None:
    reason = extension.missing or f"this build of pyaccel has no kernels for device '{device}'"
    warnings.warn(
        f"pyaccel: {reason}; the plain-torch reference runs instead, many times slower. `python -m pyaccel doctor` tells more.",
        RuntimeWarning,
        stacklevel=2,
    )
