"""A LightningModule, accelerated whole: Lightning's Trainer trains, validates and saves it.

Run: python examples/lightning_module.py
"""

import copy
import logging
import tempfile
import warnings

import pytorch_lightning as lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxaccel


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 1))
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("error", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trained(module, folder):
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    return torch.tensor([*module.losses, trainer.callback_metrics["error"]])


warnings.filterwarnings("ignore", module="pytorch_lightning")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
torch.manual_seed(0)
x, y, module = torch.randn(32, 8), torch.randn(32, 1), Regression()
fast = fxaccel.accelerate(copy.deepcopy(module))
with tempfile.TemporaryDirectory() as folder:
    got, want = trained(fast, folder), trained(module, f"{folder}/original")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(fast.report().captures) == 2  # training, and validation without gradients
    loaded = Regression.load_from_checkpoint(f"{folder}/last.ckpt")
assert all(torch.equal(v, fast.state_dict()[k]) for k, v in loaded.state_dict().items())
print("losses", [round(v, 4) for v in got.tolist()])
