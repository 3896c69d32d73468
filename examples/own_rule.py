"""An optimizer with an update rule of one's own: Signum (Bernstein et al., arXiv:1802.04434), with 8-bit state."""

import torch
import torch.nn.functional as F
from torch import nn

import fusedopt


def signum(p, g, exp_avg, decay, w1, lr):
    """The update of one element. `sign` is a name of the rule language and needs no import."""
    exp_avg = exp_avg + w1 * (g - exp_avg)
    p = p * decay - lr * sign(exp_avg)  # noqa: F821
    return p, exp_avg


class Signum(fusedopt.Optimizer):
    rule = fusedopt.rule_of(signum)
    states = {"exp_avg": "signed"}

    def __init__(self, params, lr=1e-3, beta=0.9, weight_decay=0.01, **options):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay}, **options)

    def scalars(self, group, step):
        return {"decay": 1 - group["lr"] * group["weight_decay"], "w1": 1 - group["beta"], "lr": group["lr"]}


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))
optimizer = Signum(model.parameters(), state_dtype="int8", max_grad_norm=1.0)

for step in range(1, 301):
    x = 2 * torch.rand(256, 2) - 1
    y = torch.sin(4 * x[:, :1]) * torch.cos(3 * x[:, 1:])
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.5f}")
