"""A softmax of logits over a temperature, in pieces: what the losses and Sinkhorn have in common inside their kernels.

A softmax is exp2((logit - top) * scale) / total, with scale = LOG2_E / temp, top the largest logit and total the sum
of the numerators. `top` and `total` are kept as two words: in one, as log-sum-exp, rounding at logits of 1e4 and
temperature 0.04 would move every probability by a percent. For the same reason `top` is subtracted first.
"""

from fastdino_kernels.launch import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e36)  # the top of no logit: finite, also times a scale, so that 0 * (LOWEST - top) is 0


# To half an ulp and a little, where `/` may be off by 2: all that is multiplied with it would be wrong by as much. One
# Newton step; `tl.div_rn` does the same in a function call, whose registers spill on sm_100.
@triton.jit
def quotient(x, y):
    first = x / y
    return first + tl.fma(-first, y, x) / y


@triton.jit
def scale_of(temp_ptr):
    return quotient(tl.full((), LOG2_E, tl.float32), tl.load(temp_ptr).to(tl.float32))


# A chunk of a row, (..., LANES, WIDTH), LOWEST where it is not inside: logits less the lane's new top (..., LANES),
# their numerators, the new top, and what the lane's sums so far are to be multiplied with.
@triton.jit
def numerators(row, inside, scale, top):
    new_top = tl.maximum(top, tl.max(row, axis=-1))
    below = row - tl.expand_dims(new_top, -1)
    exps = tl.where(inside, tl.exp2(below * scale), 0.0)
    return below, exps, new_top, tl.exp2((top - new_top) * scale)
