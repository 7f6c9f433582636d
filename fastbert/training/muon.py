"""Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982) for the matrices of
the blocks and TUPE's two projections, with torch's fused AdamW for all other parameters.

torch.optim.Muon updates whole weights one by one and cannot skip an update on the device; so the update is implemented
here, and the tests compare it with torch's.

With several processes each orthogonalizes an equal part of the matrices; if weights are sharded, their updates are
gathered before, because a matrix can be orthogonalized only as a whole.

Shapes: N matrices of one shape, R rows, C columns.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastbert.training.world import ONE_PROCESS, World

NEWTON_SCHULZ_STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # lower bound of the norm in the denominator
MATCH_ADAMW = 0.2
GRAM_RATIO = 2  # of the longer to the shorter side, from which on fewer operations go through X X^T alone
STACKED = 2**25  # largest number of elements that are orthogonalized together


class Muon(torch.optim.Optimizer):
    """The Muon optimizer. For a matrix W [R, C], its gradient G, momentum mu, rate eta and weight decay lambda:

        B  <-  mu B + (1 - mu) G
        U   =  mu B + (1 - mu) G                                    (Nesterov)
        W  <-  W - eta lambda W - 0.2 eta sqrt(max(R, C)) orthogonalized(U)

    An orthogonal matrix has entries of root mean square 1 / sqrt(max(R, C)), so with that factor an update is about as
    large as a typical update of AdamW, 0.2 eta, and both use the same learning rate.

    `guarded_step` steps it like torch's fused optimizers: if `found_inf` is 1, nothing changes.
    """

    _step_supports_amp_scaling = True  # reads `found_inf`

    def __init__(
        self,
        groups: list[dict],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        dtype: torch.dtype,
        world: World = ONE_PROCESS,
    ) -> None:
        """
        Args:
            groups: parameter groups. Muon updates those with "matrices", which lists the number of matrices of equal
                shape stacked in each parameter; AdamW updates the others, of which there must be at least one.
            betas, eps: constants of AdamW.
            dtype: precision of the products in the Newton-Schulz iteration.
        """
        super().__init__(groups, {"lr": lr})
        for group in self._hidden():
            group["momentum"] = momentum
        self.dtype, self.world = dtype, world
        self._adamw = torch.optim.AdamW(self._others(), lr=lr, betas=betas, eps=eps, fused=True)

    def _hidden(self) -> list[dict]:
        return [group for group in self.param_groups if "matrices" in group]

    def _others(self) -> list[dict]:
        return [group for group in self.param_groups if "matrices" not in group]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        found_inf = getattr(self, "found_inf", None)
        # Loading a state replaces groups and moments, which AdamW uses too.
        self._adamw.param_groups, self._adamw.state = self._others(), self.state
        self._adamw.found_inf = found_inf
        self._adamw.step()
        for group in self._hidden():
            self._step_hidden(group, found_inf)
        return loss

    def _step_hidden(self, group: dict, found_inf: Tensor | None) -> None:
        """Updates a group unless `found_inf`, a scalar on the device, is 1."""
        trained = [(p, n) for p, n in zip(group["params"], group["matrices"], strict=True) if p.grad is not None]
        if not trained:
            return
        local = self.world.local
        for parameter, _ in trained:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        parameters = [local(parameter) for parameter, _ in trained]
        gradients = [local(parameter.grad) for parameter, _ in trained]
        buffers = [local(self.state[parameter]["momentum_buffer"]) for parameter, _ in trained]
        skip = torch.zeros((), dtype=torch.bool, device=parameters[0].device) if found_inf is None else found_inf != 0
        momentum, rate = group["momentum"], group["lr"]
        for gradient in gradients:  # they may contain NaN, and 0 * NaN is NaN
            gradient.masked_fill_(skip, 0.0)
        torch._foreach_mul_(buffers, torch.where(skip, 1.0, momentum))
        torch._foreach_add_(buffers, gradients, alpha=1 - momentum)
        torch._foreach_lerp_(gradients, buffers, momentum)  # the gradients become U, then the updates
        for stack in stacks(trained):
            wholes = [self.world.full(parameter.grad) for parameter, _ in stack]
            views = [whole.unflatten(0, (count, -1)) for whole, (_, count) in zip(wholes, stack, strict=True)]
            matrices_NRC = torch.cat(views)
            scale = torch.where(skip, 0.0, -MATCH_ADAMW * rate * math.sqrt(max(matrices_NRC.shape[1:])))
            directions = self.directions(matrices_NRC).to(matrices_NRC.dtype).mul_(scale)
            torch._foreach_copy_(views, directions.split([len(view) for view in views]))
            if self.world.sharded:
                for whole, (parameter, _) in zip(wholes, stack, strict=True):
                    local(parameter.grad).copy_(local(self.world.like(whole, parameter)))
        torch._foreach_mul_(parameters, torch.where(skip, 1.0, 1 - rate * group["weight_decay"]))
        torch._foreach_add_(parameters, gradients)

    def directions(self, matrices_NRC: Tensor) -> Tensor:
        """The orthogonalized matrices. Each rank computes an equal part of them."""
        count, size = len(matrices_NRC), self.world.size
        if size == 1:
            return orthogonalized(matrices_NRC, self.dtype)
        most = -(-count // size)
        mine = matrices_NRC[self.world.rank * most : (self.world.rank + 1) * most]
        if missing := most - len(mine):
            mine = torch.cat([mine, mine.new_zeros(missing, *mine.shape[1:])])
        return self.world.gather(orthogonalized(mine, self.dtype))[:count]


def stacks(trained: Sequence[tuple[nn.Parameter, int]]) -> Iterator[list[tuple[nn.Parameter, int]]]:
    """Groups of weights, each with the number of its matrices: those of a group have one shape and together at most
    STACKED elements."""
    by_shape: dict[tuple[int, ...], list[tuple[nn.Parameter, int]]] = {}
    for parameter, count in trained:
        rows, *columns = parameter.shape
        by_shape.setdefault((rows // count, *columns), []).append((parameter, count))
    for members in by_shape.values():
        stack: list[tuple[nn.Parameter, int]] = []
        for parameter, count in members:
            if stack and sum(other.numel() for other, _ in stack) + parameter.numel() > STACKED:
                yield stack
                stack = []
            stack.append((parameter, count))
        yield stack


def orthogonalized(matrices_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximates U V^T of the singular value decomposition U S V^T of each matrix by five steps of

        X  <-  a X + (b X X^T + c (X X^T)^2) X,        starting from X = G / |G|,

    which map every singular value that is not tiny into 0.7 to 1.2. Matrices of zeros stay zero.

    Args:
        dtype: precision of the products and of the result.
    """
    a, b, c = COEFFICIENTS
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.mT if tall else matrices_NRC  # X X^T is then the smaller of the two products
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)).to(dtype)
    if dtype == torch.float32 and x.shape[2] >= GRAM_RATIO * x.shape[1]:
        x = _through_gram(x)
    else:
        for _ in range(NEWTON_SCHULZ_STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _through_gram(x_NRC: Tensor) -> Tensor:
    """The same five steps for wide matrices, with fewer operations: a step X <- Q X, with Q = a I + b A + c A^2 of
    A = X X^T, changes A into Q A Q, so that all steps are products of the small A and Q, and X is multiplied once by
    the product P of all Q. Small singular values are less exact, because A has their squares."""
    a, b, c = COEFFICIENTS
    gram, product = x_NRC @ x_NRC.mT, None
    for step in range(NEWTON_SCHULZ_STEPS):
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=1, dim2=2).add_(a)
        product = q if product is None else product @ q
        if step < NEWTON_SCHULZ_STEPS - 1:
            gram = q @ (gram @ q)
    return product @ x_NRC


def orthogonalization_flops(count: int, rows: int, columns: int) -> int:
    """FLOPs of the iteration of `orthogonalized` for `count` matrices, a multiply and an add counted as two. The
    shorter form for float32 is not counted, so that the number does not depend on the machine."""
    short, long = sorted((rows, columns))
    return 2 * count * NEWTON_SCHULZ_STEPS * (2 * short**2 * long + short**3)
