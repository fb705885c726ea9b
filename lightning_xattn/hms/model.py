"""The reference network: a graph and time encoder per modality, bidirectional cross-attention, a classifier.

Sizes in the docstrings: ``B`` samples, ``W`` windows of a modality (9 of EEG, 119 of the spectrogram).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GATv2Conv, global_mean_pool

from lightning_xattn.core.errors import DataError, SettingError, ShapeError
from lightning_xattn.hms.montage import CLASSES

TOKEN_DIM = 256


@dataclass(frozen=True, eq=False)
class JoinedWindows:
    """One modality's windows as one disjoint graph; graph ``w * samples + b`` is window w of sample b."""

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor | None
    graph: Tensor
    """For each node, the graph it belongs to."""
    windows: int
    samples: int

    @classmethod
    def from_windows(cls, windows: Sequence[Any], modality: str, edge_attr: bool) -> JoinedWindows:
        """Join the windows of a modality, so that they are encoded at once instead of one after the other.

        Each window is a PyG ``Batch`` with one graph per sample, or such a list of ``Data`` (which ``batch[[0]]``
        gives). Graphs may differ in their number of nodes.

        Raises
        ------
        DataError
            If there are no windows, one is no batch of graphs, or one lacks node features, edges or, with
            ``edge_attr``, attributes ``(edges, 1)`` of the edges.
        ShapeError
            If the windows have different numbers of graphs.
        """
        if not isinstance(windows, (list, tuple)) or not windows:
            raise DataError(
                f"The {modality} graphs must be a list with one PyG Batch per window; "
                f"got {'an empty list' if isinstance(windows, (list, tuple)) else type(windows).__name__}."
            )
        batches = [_as_batch(window, f"{modality} window {i}") for i, window in enumerate(windows)]
        counts = [batch.num_graphs for batch in batches]
        if len(set(counts)) > 1:
            odd = next(i for i, count in enumerate(counts) if count != counts[0])
            raise ShapeError(
                f"Every {modality} window must hold one graph per sample; "
                f"window 0 holds {counts[0]} graphs, window {odd} holds {counts[odd]}."
            )
        features = _collect(batches, "x", modality)
        edges = _collect(batches, "edge_index", modality)
        sample = torch.cat([batch.batch for batch in batches])
        nodes = torch.tensor([x.shape[0] for x in features], device=sample.device)
        links = torch.tensor([e.shape[1] for e in edges], device=sample.device)
        window = torch.arange(len(batches), device=sample.device).repeat_interleave(nodes)
        return cls(
            x=torch.cat(features),
            edge_index=torch.cat(edges, dim=1) + (nodes.cumsum(0) - nodes).repeat_interleave(links),
            edge_attr=torch.cat(_collect(batches, "edge_attr", modality)) if edge_attr else None,
            graph=window * counts[0] + sample,
            windows=len(batches),
            samples=counts[0],
        )


def _as_batch(window: object, where: str) -> Batch:
    if isinstance(window, Batch):
        return window
    if isinstance(window, (list, tuple)) and window and all(isinstance(graph, Data) for graph in window):
        return Batch.from_data_list(list(window))
    raise DataError(f"{where} must be a PyG Batch or a non-empty list of Data; got {type(window).__name__}.")


def _collect(batches: Sequence[Batch], key: str, modality: str) -> list[Tensor]:
    missing = [i for i, batch in enumerate(batches) if getattr(batch, key, None) is None]
    if missing:
        raise DataError(
            f"The {modality} graphs need '{key}', which window(s) {missing} lack; "
            f"window {missing[0]} has {sorted(batches[missing[0]].keys())}."
        )
    return [getattr(batch, key) for batch in batches]


class GraphEncoder(nn.Module):
    """Two layers of graph attention over the nodes of each graph; ``edge_dim=None``: edges without attributes."""

    def __init__(self, in_features: int, edge_dim: int | None, hidden: int) -> None:
        super().__init__()
        heads = 4
        # Raw log powers lie far from zero. They do not drift while the model learns, so a plain average over all
        # batches (momentum=None) is the right running statistic.
        self.norm = nn.BatchNorm1d(in_features, momentum=None)
        self.conv1 = GATv2Conv(in_features, hidden // heads, heads=heads, edge_dim=edge_dim)
        self.conv2 = GATv2Conv(hidden, hidden // heads, heads=heads, edge_dim=edge_dim)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None) -> Tensor:
        """Encode nodes ``(nodes, in_features)`` along edges ``(2, edges)`` to ``(nodes, hidden)``."""
        x = self.norm(x)
        x = F.elu(self.conv1(x, edge_index, edge_attr))
        return F.elu(self.conv2(x, edge_index, edge_attr))


class ModalityEncoder(nn.Module):
    """Graphs of one modality to its tokens: graph attention in each window, then a BiLSTM over the windows.

    ``modality`` is its name, for messages; ``edge_dim=None``: edges without attributes.
    """

    def __init__(self, modality: str, in_features: int, edge_dim: int | None) -> None:
        super().__init__()
        self.modality, self.in_features, self.edge_dim = modality, in_features, edge_dim
        hidden = 64
        self.graphs = GraphEncoder(in_features, edge_dim, hidden)
        self.time = nn.LSTM(hidden, TOKEN_DIM // 2, batch_first=True, bidirectional=True)

    def forward(self, windows: Sequence[Any]) -> Tensor:
        """Encode ``W`` PyG batches of ``B`` graphs to a token for each window, ``(B, W, 256)``.

        Raises ``DataError`` or ``ShapeError`` if the windows do not belong together (see ``JoinedWindows``), or have
        nodes with another number of features.
        """
        joined = JoinedWindows.from_windows(windows, self.modality, edge_attr=self.edge_dim is not None)
        if joined.x.dim() != 2 or joined.x.shape[1] != self.in_features:
            raise ShapeError(
                f"The {self.modality} nodes must have {self.in_features} features; "
                f"got x of shape {tuple(joined.x.shape)}."
            )
        x = self.graphs(joined.x, joined.edge_index, joined.edge_attr)
        x = global_mean_pool(x, joined.graph, joined.windows * joined.samples)
        tokens: Tensor = self.time(x.view(joined.windows, joined.samples, -1).transpose(0, 1))[0]
        return tokens


class CrossModalFusion(nn.Module):
    """Cross-attention in both directions between two token sequences, pooled afterwards.

    Pooling comes *after* the fusion, so that attention has keys to choose from: with one token on a side, as in many
    published models, softmax over a single key is 1 whatever the model learned. ``dropout`` acts on what attention adds
    to the tokens.
    """

    def __init__(self, dim: int = TOKEN_DIM, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.eeg_norm = nn.LayerNorm(dim)
        self.spec_norm = nn.LayerNorm(dim)
        # No dropout inside: MultiheadAttention returns its weights after dropout, where rows no longer sum to 1.
        self.eeg_to_spec_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.spec_to_eeg_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, eeg: Tensor, spec: Tensor, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Fuse EEG tokens ``(B, Q, dim)`` with spectrogram tokens ``(B, K, dim)`` to a vector ``(B, 2 * dim)``.

        With ``return_attention`` also the weights per head, ``{'eeg_to_spec': (B, heads, Q, K), 'spec_to_eeg':
        (B, heads, K, Q)}``, whose rows sum to 1.
        """
        queries, keys = self.eeg_norm(eeg), self.spec_norm(spec)
        # Always with weights: without them another kernel runs, whose output differs in its last bits.
        want = {"need_weights": True, "average_attn_weights": False}
        from_spec, eeg_to_spec = self.eeg_to_spec_attn(queries, keys, keys, **want)
        from_eeg, spec_to_eeg = self.spec_to_eeg_attn(keys, queries, queries, **want)
        eeg, spec = eeg + self.dropout(from_spec), spec + self.dropout(from_eeg)
        fused = torch.cat([eeg.mean(1), spec.mean(1)], dim=-1)
        if return_attention:
            return fused, {"eeg_to_spec": eeg_to_spec, "spec_to_eeg": spec_to_eeg}
        return fused


class HMSNetwork(nn.Module):
    """EEG graphs and spectrogram graphs to class logits.

    Parameters
    ----------
    heads
        Heads of the cross-attention; divides 256.
    dropout
        In the fusion and the classifier, in [0, 1).

    Raises
    ------
    SettingError
        If a setting is not allowed.
    """

    def __init__(self, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        if heads < 1 or TOKEN_DIM % heads:
            allowed = [n for n in range(1, TOKEN_DIM + 1) if TOKEN_DIM % n == 0]
            raise SettingError(f"The number of heads must be one of {allowed}; got {heads}.")
        if not 0 <= dropout < 1:
            raise SettingError(f"dropout must lie in [0, 1); got {dropout}.")
        self.eeg_encoder = ModalityEncoder("EEG", 5, 1)
        self.spec_encoder = ModalityEncoder("spectrogram", 4, None)
        self.fusion = CrossModalFusion(TOKEN_DIM, heads, dropout)
        self.classifier = nn.Sequential(
            nn.Linear(2 * TOKEN_DIM, TOKEN_DIM),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(TOKEN_DIM, len(CLASSES)),
        )

    def forward(self, eeg_graphs: Sequence[Any], spec_graphs: Sequence[Any]) -> Tensor:
        """Return logits ``(B, 6)`` for a PyG ``Batch`` of ``B`` graphs, or a list of ``B`` ``Data``, of each window.

        EEG nodes have 5 features and edges one attribute, spectrogram nodes have 4 and edges none. Raises ``DataError``
        or ``ShapeError`` if they have not, or if the modalities hold different numbers of samples.
        """
        eeg, spec = self.eeg_encoder(eeg_graphs), self.spec_encoder(spec_graphs)
        if eeg.shape[0] != spec.shape[0]:
            raise ShapeError(
                f"Both modalities must hold the same samples; got EEG windows of {eeg.shape[0]} graphs and "
                f"spectrogram windows of {spec.shape[0]}."
            )
        logits: Tensor = self.classifier(self.fusion(eeg, spec))
        return logits
