"""Every update rule, stated once. This file imports nothing and knows no storage.

A rule is a straight-line function `(p, g, *states, *scalars) -> (p, *states)` of one element: the parameter, its
gradient, the optimizer's states, and scalars that the optimizer class computes in double once per step. What it may
contain is fixed and checked by `fusedopt.binding`, which turns the same code object into the torch reference and into
`csrc/rules.h`:

- `+ - * /`, unary minus, number literals, and the functions `abs sign sqrt minimum maximum where`;
- comparisons, only as the condition of `where`;
- no division by a scalar and no arithmetic among scalars alone: both belong to the class's `scalars`;
- a number is divided by a value only as `1 / x`, since torch rounds other such quotients twice.

Scalars that recur:

- `l2`: the L2 penalty, added to the gradient; 0 switches it off.
- `decay`: decoupled weight decay, `1 - lr * weight_decay`; 1 switches it off.
- `w1`, `w2`, `w3`: `1 - beta`, the weight of the new value in a moving average. Written as `m + w * (g - m)` an average
  of a constant is exactly that constant, which `beta * m + w * g` misses by 1e-5 in float32 at beta = 0.999.
- `step_size`, `eps`: with bias correction folded in. For Adam, with `c1 = 1 - beta1**t` and `c2 = 1 - beta2**t`,
  `lr * (m / c1) / (sqrt(v / c2) + eps)  =  (lr * sqrt(c2) / c1) * m / (sqrt(v) + eps * sqrt(c2))`.
"""


def sgd(p, g, l2, lr):
    """Stochastic gradient descent."""
    p = p - lr * (g + l2 * p)
    return p


def sgd_momentum(p, g, momentum_buffer, l2, momentum, gain, lr_grad, lr_buffer):
    """SGD with heavy-ball or Nesterov momentum; `gain` is 1 - dampening, and 1 on a parameter's first step.

    The step is a blend of gradient and buffer: (0, lr) is heavy-ball momentum, (lr, lr * momentum) Nesterov's.
    """
    g = g + l2 * p
    momentum_buffer = momentum * momentum_buffer + gain * g
    p = p - (lr_grad * g + lr_buffer * momentum_buffer)
    return p, momentum_buffer


def adagrad(p, g, sum, l2, lr, eps):
    """Adagrad (Duchi et al., 2011)."""
    g = g + l2 * p
    sum = sum + g * g
    p = p - lr * g / (sqrt(sum) + eps)
    return p, sum


def rmsprop(p, g, square_avg, l2, w2, lr, eps):
    """RMSprop (Hinton, Coursera lecture 6e, 2012)."""
    g = g + l2 * p
    square_avg = square_avg + w2 * (g * g - square_avg)
    p = p - lr * g / (sqrt(square_avg) + eps)
    return p, square_avg


def rmsprop_momentum(p, g, square_avg, momentum_buffer, l2, w2, momentum, lr, eps):
    """RMSprop with momentum on the normalized gradient."""
    g = g + l2 * p
    square_avg = square_avg + w2 * (g * g - square_avg)
    momentum_buffer = momentum * momentum_buffer + g / (sqrt(square_avg) + eps)
    p = p - lr * momentum_buffer
    return p, square_avg, momentum_buffer


def rmsprop_centered(p, g, square_avg, grad_avg, l2, w2, floor, lr, eps):
    """RMSprop normalized by an estimate of the variance (Graves, arXiv:1308.0850).

    Rounding can make the mean square less than the squared mean; the variance is at least `floor` of the mean square.
    """
    g = g + l2 * p
    square_avg = square_avg + w2 * (g * g - square_avg)
    grad_avg = grad_avg + w2 * (g - grad_avg)
    variance = maximum(square_avg - grad_avg * grad_avg, floor * square_avg)
    p = p - lr * g / (sqrt(variance) + eps)
    return p, square_avg, grad_avg


def rmsprop_centered_momentum(p, g, square_avg, momentum_buffer, grad_avg, l2, w2, floor, momentum, lr, eps):
    """Centered RMSprop with momentum."""
    g = g + l2 * p
    square_avg = square_avg + w2 * (g * g - square_avg)
    grad_avg = grad_avg + w2 * (g - grad_avg)
    variance = maximum(square_avg - grad_avg * grad_avg, floor * square_avg)
    momentum_buffer = momentum * momentum_buffer + g / (sqrt(variance) + eps)
    p = p - lr * momentum_buffer
    return p, square_avg, momentum_buffer, grad_avg


def lion(p, g, exp_avg, decay, w1, w2, lr):
    """Lion (Chen et al., arXiv:2302.06675)."""
    update = exp_avg + w1 * (g - exp_avg)
    p = p * decay - lr * sign(update)
    exp_avg = exp_avg + w2 * (g - exp_avg)
    return p, exp_avg


def adam(p, g, exp_avg, exp_avg_sq, l2, decay, w1, w2, step_size, eps):
    """Adam (Kingma and Ba, arXiv:1412.6980) and AdamW (Loshchilov and Hutter, arXiv:1711.05101)."""
    g = g + l2 * p
    exp_avg = exp_avg + w1 * (g - exp_avg)
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq)
    p = p * decay - step_size * exp_avg / (sqrt(exp_avg_sq) + eps)
    return p, exp_avg, exp_avg_sq


def amsgrad(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, l2, decay, w1, w2, step_size, eps):
    """Adam and AdamW with the largest second moment so far (Reddi et al., arXiv:1904.09237)."""
    g = g + l2 * p
    exp_avg = exp_avg + w1 * (g - exp_avg)
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq)
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    p = p * decay - step_size * exp_avg / (sqrt(max_exp_avg_sq) + eps)
    return p, exp_avg, exp_avg_sq, max_exp_avg_sq


def adamax(p, g, exp_avg, exp_inf, l2, w1, beta2, step_size, eps):
    """Adamax, Adam with the infinity norm (Kingma and Ba, arXiv:1412.6980, section 7)."""
    g = g + l2 * p
    exp_avg = exp_avg + w1 * (g - exp_avg)
    exp_inf = maximum(beta2 * exp_inf, abs(g) + eps)
    p = p - step_size * exp_avg / exp_inf
    return p, exp_avg, exp_inf


def nadam(p, g, exp_avg, exp_avg_sq, l2, decay, w1, w2, step_grad, step_avg, eps):
    """NAdam, Adam with Nesterov momentum (Dozat, 2016)."""
    g = g + l2 * p
    exp_avg = exp_avg + w1 * (g - exp_avg)
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq)
    p = p * decay - (step_grad * g + step_avg * exp_avg) / (sqrt(exp_avg_sq) + eps)
    return p, exp_avg, exp_avg_sq


def radam(p, g, exp_avg, exp_avg_sq, l2, decay, w1, w2, step_size, adapt, eps):
    """RAdam (Liu et al., arXiv:1908.03265).

    While the variance is not tractable the step is not adaptive: `adapt` is 0 and `eps` is 1, which divides it by 1.
    """
    g = g + l2 * p
    exp_avg = exp_avg + w1 * (g - exp_avg)
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq)
    p = p * decay - step_size * exp_avg / (adapt * sqrt(exp_avg_sq) + eps)
    return p, exp_avg, exp_avg_sq


def ademamix(p, g, exp_avg, exp_avg_slow, exp_avg_sq, decay, w1, w2, w3, step_size, step_slow, eps):
    """AdEMAMix, AdamW with a second, slow average (Pagliardini et al., arXiv:2409.03137)."""
    exp_avg = exp_avg + w1 * (g - exp_avg)
    exp_avg_slow = exp_avg_slow + w3 * (g - exp_avg_slow)
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq)
    p = p * decay - (step_size * exp_avg + step_slow * exp_avg_slow) / (sqrt(exp_avg_sq) + eps)
    return p, exp_avg, exp_avg_slow, exp_avg_sq


def muon_momentum(p, g, momentum_buffer, update, w1, blend):
    """Muon's momentum (Jordan et al., 2024): what is to be orthogonalized; `blend` is w1 for Nesterov's, else 0."""
    momentum_buffer = momentum_buffer + w1 * (g - momentum_buffer)
    update = momentum_buffer + blend * (g - momentum_buffer)
    return p, momentum_buffer, update


def muon(p, g, update, decay, step_size):
    """Muon's step by an orthogonalized update."""
    p = p * decay - step_size * update
    return p, update


def muon_cautious(p, g, update, decay, step_size):
    """Muon's step with cautious weight decay (Chen et al., arXiv:2510.12402): none where the step grows p."""
    p = where(update * p < 0, p, p * decay) - step_size * update
    return p, update
