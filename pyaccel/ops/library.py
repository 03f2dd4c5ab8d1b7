"""How an operator is registered: schema, kernels, fake, autograd, and a fallback that says so before it runs.

`torch.library.Library(...).define/impl`, not the `custom_op` decorator: its wrapper costs about ten times the call.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch

from pyaccel import extension

library = torch.library.Library("pyaccel", "DEF")


def register(
    schema: str,
    *,
    kernel: Callable,
    fake: Callable,
    fallback: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Define `pyaccel::<schema>` and return its default overload.

    `kernel` runs on the devices that the compiled module has kernels for; on any other device `fallback` (plain torch)
    runs, after one warning that says why. `backward=None`: the operator is itself a gradient (or its output is bits),
    and differentiating it is refused.
    """
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if extension._C is not None:
        library.impl(name, kernel, "CPU")
        if extension.has_cuda():
            library.impl(name, kernel, "CUDA")
    library.impl(name, _warned(name, fallback), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyaccel::{name}", fake, lib=library)
    if backward is None:
        setup_context, backward = None, _refuse_double_backward(name)
    torch.library.register_autograd(f"pyaccel::{name}", backward, setup_context=setup_context, lib=library)
    return getattr(torch.ops.pyaccel, name).default


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
