"""Training in several processes: the same file under ``python``, which starts them, and under ``torchrun``.

    python examples/distributed.py --processes 2
    torchrun --nproc-per-node 2 examples/distributed.py --processes 2

Every process has its own rows of each batch; the gradient is that of one process on all of them. Afterwards each
summarises its share of the images, and the first one prints the summary of all.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from _common import VAE, load_images
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pyro_amortized import AmortizedGuide, estimate_gaps
from pyro_amortized.lightning import SVIModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=40, help="how many images' gaps to measure")
    parser.add_argument("--data", default=None, help="an .npz file with train_images and test_images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lightning.seed_everything(0)
    train, test = load_images(options.data)
    model = VAE.for_images(train)
    guide = AmortizedGuide(model, model.make_encoder())
    module = SVIModule(model, guide)
    trainer = lightning.Trainer(
        max_epochs=options.epochs, accelerator="cpu", devices=options.processes, logger=False,
        strategy="ddp" if options.processes > 1 else "auto", enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    loaders = [DataLoader(TensorDataset(part), batch_size=50, shuffle=part is train) for part in (train, test)]
    trainer.fit(module, *loaders)
    images = TensorDataset(test[: options.images])
    sampler = DistributedSampler(images, shuffle=False) if options.processes > 1 else None
    gaps = estimate_gaps(model, guide.eval(), DataLoader(images, batch_size=20, sampler=sampler), tolerance=0.1)
    if trainer.is_global_zero:
        print(module.history)
        print(gaps)


if __name__ == "__main__":
    main()
