"""Explain your own model of two modalities, with torch alone.

python examples/explain_own_model.py OUT
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import ExplainabilityCapture, TokenAxis, create_explainability_report
from lightning_xattn.visualizations import plot_modality_alignment

(out,) = map(Path, sys.argv[1:])


class AudioTextClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.audio, self.text = nn.Linear(20, 64), nn.Embedding(100, 64)
        self.audio_to_text_attn = nn.MultiheadAttention(64, 4, batch_first=True)
        self.text_to_audio_attn = nn.MultiheadAttention(64, 4, batch_first=True)
        self.head = nn.Linear(128, 3)

    def forward(self, audio, text):
        audio, text = self.audio(audio), self.text(text)  # (batch, 30, 64) and (batch, 12, 64)
        heard, _ = self.audio_to_text_attn(audio, text, text)
        read, _ = self.text_to_audio_attn(text, audio, audio)
        return self.head(torch.cat([heard.mean(dim=1), read.mean(dim=1)], dim=1))


torch.manual_seed(0)
target = torch.randint(3, (300,))
audio = torch.randn(300, 30, 20) + target[:, None, None]
text = torch.randint(0, 30, (300, 12)) + 30 * target[:, None]
loader = DataLoader(TensorDataset(audio, text, target), batch_size=32)

model = AudioTextClassifier()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for audio, text, target in loader:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(audio, text), target).backward()
    optimizer.step()

explainer = ExplainabilityCapture(
    model,
    predict=lambda model, batch: model(batch[0], batch[1]),  # the batch also has the targets
    class_names=["rain", "wind", "sea"],
    axes={"audio": TokenAxis("Audio (s)", spans=[(i, i + 1) for i in range(30)])},
)
print(create_explainability_report(explainer.explain_loader(loader), out / "report.md"))
results = explainer.explain_batch(next(iter(loader)))
plot_modality_alignment(results["attention"][0], axes=results["axes"], save_path=out / "alignment.png")
