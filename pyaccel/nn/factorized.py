"""A convolution kept as factors, so that a sequence of tasks can share what earlier ones learned and add only ranks.

    W = N diag(|sigma|) C,   W flattened to [O, I kh kw],  N [O, r],  sigma [r],  C [r, I kh kw]    (2009.01956)

N plays the left and C the right singular vectors; neither is exactly orthonormal, the penalties pull them there. The
first R entries are those of finished tasks. They are buffers, not parameters: no optimizer, momentum or weight decay
can move them, so a finished task, which reads a prefix of the entries, gives the same bits for ever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

ENERGY = 3e-5  # share of the squared new entries that pruning may drop (2009.01956, official scripts)
FACTORS = ("left", "sigma", "right")


def hoyer(values: Tensor) -> Tensor:
    """||v||_1 / ||v||_2 - 1 of all entries: 0 for a single non-zero entry, sqrt(n) - 1 for n equal ones.

    The sparsity penalty of 2009.01956; 0 where every entry is 0 or there is none.
    """
    length = torch.linalg.vector_norm(values)  # its gradient at 0 is 0, where that of a root of squares is none
    ratio = values.abs().sum() / length.clamp_min(torch.finfo(values.dtype).tiny)
    return torch.where(length > 0, ratio - 1, torch.zeros_like(ratio))


def orthogonality(matrix: Tensor) -> Tensor:
    """||G - I||_F^2 / g^2 with G the g x g Gram matrix of the shorter side: 0 for orthonormal rows or columns.

    matrix [rows, columns]: G = A A^T where rows <= columns, else A^T A (2009.01956, official code). 0 for an empty one.
    """
    if matrix.dim() != 2:
        raise ValueError(f"orthogonality: expected a matrix [rows, columns], got shape {list(matrix.shape)}")
    if not matrix.numel():
        return matrix.new_zeros(())
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum() / len(gram) ** 2


def kept_by_energy(sigma: Tensor, tolerance: float = ENERGY) -> Tensor:
    """Which entries pruning keeps (bool [r]): the fewest largest ones with at least 1 - tolerance of all squares.

    Entries as large as the smallest kept one are kept too (2009.01956, official code).
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"kept_by_energy: tolerance must satisfy 0 <= tolerance < 1, got {tolerance}")
    energy = sigma.detach().double().square()
    ordered = energy.sort(descending=True).values
    total = ordered.sum()
    if not total > 0:
        return torch.zeros_like(sigma, dtype=torch.bool)
    # Compared as what is left over: 1 - tolerance is near 1, where a sum of many squares has lost its last digits.
    left_over = ordered.flip(0).cumsum(0).flip(0) - ordered
    last = int((left_over <= tolerance * total).nonzero()[0])
    return energy >= ordered[last]


def grown_spare(spare: int, earlier: Sequence[int], full_rank: int, growth: str = "mean") -> int:
    """Slots for the next task, from the `spare` ones that pruning has freed (2009.01956, official code).

    earlier: cumulative ranks R_s of the tasks finished before the one just learned; none: nothing grows. growth "mean":
    at least floor(min(mean of earlier, full_rank)); "full": at least full_rank; "none": what is spare.
    """
    if growth not in ("mean", "full", "none"):
        raise ValueError(f"growth must be mean, full or none, got {growth!r}")
    if not earlier or growth == "none":
        return spare
    wanted = full_rank if growth == "full" else min(sum(earlier) / len(earlier), full_rank)
    return int(wanted) if spare < wanted else spare


class FactorizedConv2d(nn.Module):
    """A convolution without bias whose weight is a product of factors, most of them shared by all tasks.

    images `[B, I, H, W]` to `[B, O, H', W']`, as `torch.nn.Conv2d`, by one ordinary convolution with the merged weight.

    Args:
        rank: slots to begin with. None: `full_rank` = floor(I kh kw O / (O + I kh kw)), the largest rank whose factors
            take no more memory than the dense weight.

    Attributes:
        left, sigma, right: the slots being learned, N `[O, s]`, sigma `[s]`, C `[s, I kh kw]`; parameters.
        shared_left, shared_sigma, shared_right: the frozen entries of finished tasks; buffers.
        prefixes: cumulative ranks, one int64 a finished task; a buffer.
        task: whose prefix `forward` uses, counted from 0; None: all entries and slots, as in training.

    `load_state_dict` takes over the ranks of what it loads.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0, dilation: int | tuple[int, int] = 1, *, rank: int | None = None,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.columns = in_channels * math.prod(self.kernel_size)
        self.full_rank = self.columns * out_channels // (out_channels + self.columns)
        rank = self.full_rank if rank is None else rank
        if rank < 0:
            raise ValueError(f"FactorizedConv2d: rank must not be negative, got {rank}")
        kind = {"device": device, "dtype": dtype}
        self.left = nn.Parameter(torch.empty(out_channels, rank, **kind))
        self.sigma = nn.Parameter(torch.empty(rank, **kind))
        self.right = nn.Parameter(torch.empty(rank, self.columns, **kind))
        self.register_buffer("shared_left", torch.empty(out_channels, 0, **kind))
        self.register_buffer("shared_sigma", torch.empty(0, **kind))
        self.register_buffer("shared_right", torch.empty(0, self.columns, **kind))
        self.register_buffer("prefixes", torch.empty(0, dtype=torch.int64, device="cpu"))
        self.task: int | None = None
        self.renew(rank)

    @property
    def ranks(self) -> tuple[int, ...]:
        """R_1, R_2, ...: cumulative ranks of the finished tasks."""
        return tuple(self.prefixes.tolist())

    @property
    def spare(self) -> int:
        """Slots for the task at hand."""
        return len(self.sigma)

    @torch.no_grad()
    def renew(self, slots: int, generator: torch.Generator | None = None) -> None:
        """Replace the slots being learned by `slots` fresh ones: N, C normal with variance 2 / fan-in, sigma N(0, 1).

        The parameters are new objects: make a new optimizer. Fan-in: `slots` of N, I kh kw of C.
        """
        old, generator = self.sigma, generator or torch.default_generator
        # Drawn on the CPU, so that a run starts alike on every device.
        shapes = {"left": (self.out_channels, slots), "sigma": (slots,), "right": (slots, self.columns)}
        scales = {"left": math.sqrt(2 / max(slots, 1)), "sigma": 1.0, "right": math.sqrt(2 / self.columns)}
        for name in FACTORS:
            fresh = torch.randn(shapes[name], generator=generator) * scales[name]
            setattr(self, name, nn.Parameter(fresh.to(old.device, old.dtype)))

    @torch.no_grad()
    def finish_task(self, tolerance: float = ENERGY) -> int:
        """Prune the slots (see `kept_by_energy`), freeze what is kept, and note the task's prefix; returns its rank.

        Kept entries keep their order. What was pruned is gone: `renew` makes slots for the next task.
        """
        kept = kept_by_energy(self.sigma, tolerance)
        self.shared_left = torch.cat([self.shared_left, self.left[:, kept]], 1)
        self.shared_sigma = torch.cat([self.shared_sigma, self.sigma[kept]])
        self.shared_right = torch.cat([self.shared_right, self.right[kept]])
        rank = torch.tensor([len(self.shared_sigma)], dtype=torch.int64)
        self.prefixes = torch.cat([self.prefixes, rank])
        self.renew(0)
        return int(rank)

    def factors(self, task: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """N `[O, r]`, sigma `[r]`, C `[r, I kh kw]` of a finished task, or of all that there is.

        IndexError for a task that is not finished.
        """
        if task is None:
            return (
                torch.cat([self.shared_left, self.left], 1),
                torch.cat([self.shared_sigma, self.sigma]),
                torch.cat([self.shared_right, self.right]),
            )
        ranks = self.ranks
        if not 0 <= task < len(ranks):
            raise IndexError(f"FactorizedConv2d: task {task} is not among the {len(ranks)} finished tasks")
        r = ranks[task]
        # Copied: a view of a matrix that has grown since has other strides, and products may round otherwise.
        return self.shared_left[:, :r].contiguous(), self.shared_sigma[:r].clone(), self.shared_right[:r].clone()

    def merged_weight(self, task: int | None = None) -> Tensor:
        """The weight `[O, I, kh, kw]` of a finished task, or of all that there is."""
        if task is None:  # Shared space plus residual: no gradient is computed for what is frozen.
            product = _product(self.left, self.sigma, self.right)
            if len(self.shared_sigma):
                product = product + _product(self.shared_left, self.shared_sigma, self.shared_right)
        else:
            product = _product(*self.factors(task))
        return product.view(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.merged_weight(self.task), None, self.stride, self.padding, self.dilation)

    def penalties(self) -> tuple[Tensor, Tensor]:
        """`hoyer` of sigma, and the sum of `orthogonality` of N and C; frozen entries and slots together."""
        left, sigma, right = self.factors()
        return hoyer(sigma), orthogonality(left) + orthogonality(right)

    @torch.no_grad()
    def dense(self, task: int | None = None) -> nn.Conv2d:
        """The convolution to serve a task with: its merged weight, nothing else."""
        return self._convolution(self.merged_weight(task), self.stride, self.padding, self.dilation)

    @torch.no_grad()
    def two_convolutions(self, task: int | None = None) -> nn.Sequential:
        """The same as an I -> r convolution followed by a 1x1 one, r -> O: cheaper only where r < full_rank."""
        left, sigma, right = self.factors(task)
        first = right.view(-1, self.in_channels, *self.kernel_size)
        second = (left * sigma.abs())[:, :, None, None]
        return nn.Sequential(
            self._convolution(first, self.stride, self.padding, self.dilation), self._convolution(second, 1, 0, 1)
        )

    def _convolution(self, weight: Tensor, stride, padding, dilation) -> nn.Conv2d:
        outputs, inputs, *kernel = weight.shape
        made = nn.utils.skip_init(
            nn.Conv2d, inputs, outputs, tuple(kernel), stride, padding, dilation, bias=False, device=weight.device,
            dtype=weight.dtype,
        )  # fmt: skip
        made.weight = nn.Parameter(weight.detach().clone())
        return made

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, shared={len(self.shared_sigma)}, spare={self.spare}, tasks={len(self.prefixes)}"
        )

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.prefixes = self.prefixes.cpu()  # read as numbers at every forward: on a GPU that would wait
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in ("left", "sigma", "right", "shared_left", "shared_sigma", "shared_right", "prefixes"):
            own, there = getattr(self, name), state_dict.get(prefix + name)
            if there is not None and there.dim() == own.dim() and there.shape != own.shape:
                # The dimensions that are no rank must still fit: the check after this one compares what is made here.
                free = {"left": 1, "shared_left": 1}.get(name, 0)
                shape = list(own.shape)
                shape[free] = there.shape[free]
                made = own.new_empty(shape)
                setattr(self, name, nn.Parameter(made) if isinstance(own, nn.Parameter) else made)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _product(left: Tensor, sigma: Tensor, right: Tensor) -> Tensor:
    # |sigma| directly: the published code takes its root on both sides, whose gradient at 0 is not a number.
    return (left * sigma.abs()) @ right
