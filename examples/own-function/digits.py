"""An image classifier with a training loop of its own: the ten lines around `Loop` make it elastic."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from raylaunch import Config, Loop, Session


def train(config: Config, session: Session) -> None:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32, device=session.device).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels, device=session.device)
    training, held_out = slice(0, 1500), slice(1500, None)

    torch.manual_seed(config.data.seed)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    model = DistributedDataParallel(net.to(session.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.step_scheduler.max_steps)

    loop = Loop(config, session, model, optimizer, samples=len(images[training]), scheduler=scheduler)
    for batch in loop:
        loss = cross_entropy(model(images[batch.indices]), labels[batch.indices]) * batch.weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        loop.report(loss=loss.item(), lr=scheduler.get_last_lr()[0])

    if loop.finished:
        with torch.no_grad():
            right = (net(images[held_out]).argmax(dim=1) == labels[held_out]).float().mean().item()
        session.report(step=loop.step, accuracy=round(right, 4))
