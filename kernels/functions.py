"""The functions an update rule may call, in IEEE arithmetic. `fusedopt.binding` prints rules that call them."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def number(value: tl.constexpr, like):
    """A literal in the arithmetic type of `like`, so that it neither promotes nor is rounded twice."""
    return tl.full([], value, like.dtype)


@triton.jit
def divide(a, b):
    # Of float32, Triton's `/` is approximate.
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def negative(x):
    # In Triton 3.6 `-x` is `0 - x`, which makes 0 of 0 and not -0.
    return x * number(-1, x)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def sign(x):
    """NaN has sign 0."""
    zero = number(0, x)
    return tl.where(x > zero, number(1, x), tl.where(x < zero, number(-1, x), zero))


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)
