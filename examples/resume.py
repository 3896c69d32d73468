"""Resume a training that torch.optim began: its checkpoint loads into fusedopt as it is."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fusedopt


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Learn to sum 16 numbers, from the seeded batches of these steps; returns the last loss."""
    for step in steps:
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        loss = F.mse_loss(model(x), x.sum(dim=1, keepdim=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


torch.manual_seed(0)
model = nn.Linear(16, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
print(f"torch.optim, steps 0 to 99:          loss {train(model, optimizer, range(100)):.6f}")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "checkpoint.pt")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    checkpoint = torch.load(path)
print(f"torch.optim goes on, 100 to 199:     loss {train(model, optimizer, range(100, 200)):.6f}")

model = nn.Linear(16, 1)
optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2)
model.load_state_dict(checkpoint["model"])
optimizer.load_state_dict(checkpoint["optimizer"])
print(f"fusedopt from there, 100 to 199:     loss {train(model, optimizer, range(100, 200)):.6f}")
