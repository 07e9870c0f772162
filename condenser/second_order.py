"""Group norm and 2 x 2 average pooling for gradients of gradients: torch's values but for rounding, in less time.

Where a gradient is to be differentiated again, torch takes that of a group norm, and so the second one, by a pass over
the maps for every sign of its formula; and its pooling on a processor moves a fifth of the bytes that memory could.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

POOL_BY_TWO = (2, 2, 0, False, True, None)  # size, stride, padding, ceil_mode, count_include_pad, divisor


class SecondOrder(TorchFunctionMode):
    """What is computed while it is entered can be differentiated twice, quickly, but never thrice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch, or ours in its place."""
        kwargs = kwargs or {}
        if func is F.group_norm and kwargs["weight"] is not None:
            return GroupNorm.apply(args[0].contiguous(), kwargs["weight"], kwargs["bias"], args[1], kwargs["eps"])
        if func is F.avg_pool2d and args[1:] == POOL_BY_TWO:
            x = args[0]
            if x.device.type == "cpu" and x.shape[2] % 2 == x.shape[3] % 2 == 0:
                return Pool.apply(x)
        return func(*args, **kwargs)


class GroupNorm(Function):
    """y = w x^ + b [N, C, H, W] with w, b [C] and x^ = (x - mean) r over a group's channels and pixels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float) -> Tensor:
        """y."""
        y, mean, r = torch.ops.aten.native_group_norm(x, w, b, *x.shape[:2], x.shape[2:].numel(), groups, eps)
        ctx.save_for_backward(x, w, mean, r)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Gradients of <g, y>."""
        return *GroupNormGradient.apply(g.contiguous(), *ctx.saved_tensors, ctx.groups), None, None


class GroupNormGradient(Function):
    """Gradients of <g, y>: by x, r (wg - mean(wg) - x^ mean(wg x^)), means over a group; by w, sum gx^; by b, sum g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, r: Tensor, groups: int) -> Any:
        """All three."""
        ctx.save_for_backward(g, x, w, mean, r)
        ctx.groups = groups
        sizes = (*x.shape[:2], x.shape[2:].numel(), groups)
        return torch.ops.aten.native_group_norm_backward(g, x, mean, r, w, *sizes, [True, True, True])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor, a: Tensor, b: Tensor) -> Any:
        """Gradients of s = <v, dx> + <a, dw> + <b, db>, each of them some of g, v, x and 1, weighted by [N, C]."""
        whole, groups = ctx.saved_tensors[1], ctx.groups
        g, x, v = (t.contiguous().view(len(t), groups, t.shape[1] // groups, -1) for t in (*ctx.saved_tensors[:2], v))
        mean, r = (t.view(len(x), groups, 1) for t in ctx.saved_tensors[3:])
        w, a, b = (t.view(groups, -1) for t in (ctx.saved_tensors[2], a, b))
        count = x[0, 0].numel()

        def over(t: Tensor) -> Tensor:  # mean over a group of sums over pixels [N, G, C / G]
            return t.sum(2, keepdim=True) / count

        sum_g, sum_v, gv = g.sum(3), v.sum(3), (g * v).sum(3)
        gx, vx = (r * ((t * x).sum(3) - mean * total) for t, total in ((g, sum_g), (v, sum_v)))  # with x^
        g_mean, gx_mean, v_mean, vx_mean = over(w * sum_g), over(w * gx), over(sum_v), over(vx)
        # ds/dg = w r (v - mean v - x^ mean(v x^)) + a x^ + b
        of_x = r * (a - w * r * vx_mean)
        by_g = (w * r)[..., None] * v
        by_g.addcmul_(of_x[..., None], x).add_((b - w * r * v_mean - mean * of_x)[..., None])
        # u = ds/dx^ = (a - w r mean(v x^)) g - r mean(wg x^) v, and ds/dr = count * k
        of_g, of_v = a - w * r * vx_mean, -r * gx_mean
        k = over(w * gv) - v_mean * g_mean - gx_mean * vx_mean
        # ds/dx = r (u - mean u - x^ mean(u x^)) - r^2 k x^
        of_x = -r * r * (over(of_g * gx + of_v * vx) + r * k)
        by_x = (r * of_g)[..., None] * g
        by_x.addcmul_((r * of_v)[..., None], v).addcmul_(of_x[..., None], x)
        by_x.add_((-r * over(of_g * sum_g + of_v * sum_v) - mean * of_x)[..., None])
        by_w = (r * (gv - v_mean * sum_g - vx_mean * gx)).sum(0).flatten()
        return by_g.view_as(whole), by_x.view_as(whole), by_w, None, None, None


class Pool(Function):
    """Means of 2 x 2 pixels [..., 2 H, 2 W]: [..., H, W]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Rows first: their sums are contiguous."""
        rows = x[..., ::2, :] + x[..., 1::2, :]
        return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The adjoint."""
        return Spread.apply(g)


class Spread(Function):
    """A quarter of every pixel [..., H, W] in each of 2 x 2: [..., 2 H, 2 W]."""

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Tensor:
        """Columns first: rows are then copied whole."""
        return (g / 4).repeat_interleave(2, 3).repeat_interleave(2, 2)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        """The adjoint."""
        return Pool.apply(v)
