"""A plain PyTorch training script, with its optimizer swapped in one line."""

import torch
import torch.nn.functional as F
from torch import nn

import fusedopt

STEPS = 300

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)

fusedopt.swap(optimizer)  # the one line; everything else stays as it was

for step in range(1, STEPS + 1):
    x = 2 * torch.rand(256, 2) - 1
    y = torch.sin(4 * x[:, :1]) * torch.cos(3 * x[:, 1:])
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.5f}, learning rate {scheduler.get_last_lr()[0]:.5f}")
