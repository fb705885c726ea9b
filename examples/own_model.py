"""Your own model of two modalities with the callback, with Lightning and torch alone."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback


class Fusion(nn.Module):
    def __init__(self):
        super().__init__()
        # Modules with a name like <a>_to_<b> are found automatically: queries from <a>, keys from <b>.
        self.audio_to_text_attn = nn.MultiheadAttention(64, 4, batch_first=True)
        self.text_to_audio_attn = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, audio, text):  # (batch, 30, 64) and (batch, 12, 64)
        heard, _ = self.audio_to_text_attn(audio, text, text)
        read, _ = self.text_to_audio_attn(text, audio, audio)
        return torch.cat([heard.mean(dim=1), read.mean(dim=1)], dim=1)


class AudioTextClassifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.audio, self.text = nn.Linear(20, 64), nn.Embedding(100, 64)
        self.fusion, self.head = Fusion(), nn.Linear(128, 3)

    def forward(self, audio, text):
        return self.head(self.fusion(self.audio(audio), self.text(text)))

    def training_step(self, batch, batch_idx):
        audio, text, target = batch
        return nn.functional.cross_entropy(self(audio, text), target)

    def validation_step(self, batch, batch_idx):
        audio, text, target = batch
        self.log("val_loss", nn.functional.cross_entropy(self(audio, text), target))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


target = torch.randint(3, (300,))
audio = torch.randn(300, 30, 20) + target[:, None, None]
text = torch.randint(0, 30, (300, 12)) + 30 * target[:, None]
loader = DataLoader(TensorDataset(audio, text, target), batch_size=32)

trainer = pl.Trainer(max_epochs=3, callbacks=[AttentionExplainabilityCallback()])
trainer.fit(AudioTextClassifier(), loader, loader)
