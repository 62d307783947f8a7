"""Decoders: class descriptors ask the patches where they are, three layers deep.

All decoders share one skeleton. A layer gives mask logits and, but for the last one,
an update of the class queries; the last layer's update would be thrown away, so it has none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend, join_heads, split_heads
from .mixers.metaformer import map_norm
from .mixers.spam import SPAM
from .spectral.hilo import FrequencyAttention


class RelationshipDescriptor(nn.Module):
    """Class queries that know the image: t̂ = φ([t ⊙ g; t])    [SPT-SEG, eq. 8]

    Shapes: text (K, E), global embedding (B, E) -> (B, K, E).
    """

    def __init__(self, joint: int):
        super().__init__()
        self.phi = nn.Linear(2 * joint, joint)

    def forward(self, class_text_KE: Tensor, global_BE: Tensor) -> Tensor:
        text_BKE = class_text_KE.expand(len(global_BE), -1, -1)
        return self.phi(torch.cat([text_BKE * global_BE[:, None], text_BKE], dim=-1))


class TaskGate(nn.Module):
    """Keep the patches that resemble the task, then mix channels: ẑ = P · sim(z, ξ) · z    [SPT-SEG, eq. 7]

    The cosine similarity is clamped to [0, 1]; P starts as the identity. Shape kept: (B, N, E).
    """

    def __init__(self, joint: int):
        super().__init__()
        self.task_E = nn.Parameter(torch.randn(joint) * 0.02)
        self.mix_EE = nn.Parameter(torch.eye(joint))

    def forward(self, z_BNE: Tensor) -> Tensor:
        similarity_BN1 = F.cosine_similarity(z_BNE, self.task_E, dim=-1, eps=1e-12).clamp(0, 1)[..., None]
        return (z_BNE * similarity_BN1) @ self.mix_EE


class GuidedAttention(nn.Module):
    """Patches pass `frequencies`, (B, h, w, E) -> the same, and the gate; classes then match them.

    Masks = t̂ ẑᵀ    [SPT-SEG, eq. 9], unscaled; update = W softmax(Masks) ẑ, softmax over patches.

    Shapes: queries (B, K, E), patches (B, h, w, E) -> logits (B, K, N), update (B, K, E) or None.
    """

    def __init__(self, frequencies: nn.Module, joint: int, gate: bool, dropout: float, last: bool):
        super().__init__()
        self.frequencies = frequencies
        self.gate = TaskGate(joint) if gate else nn.Identity()
        self.project = None if last else nn.Linear(joint, joint)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query_BKE: Tensor, patches_BhwE: Tensor) -> tuple[Tensor, Tensor | None]:
        z_BNE = self.gate(self.frequencies(patches_BhwE).flatten(1, 2))
        logits_BKN = query_BKE @ z_BNE.transpose(1, 2)
        if self.project is None:
            return logits_BKN, None
        return logits_BKN, self.project(self.dropout(logits_BKN.softmax(-1)) @ z_BNE)


class SpectralGuidedAttention(GuidedAttention):
    """SPT-SEG's layer: frequencies are split between high and low heads."""

    def __init__(self, joint, heads, high_heads, window, gate, high_projection, dropout, last, shortcut=False):
        split = FrequencyAttention(joint, heads, high_heads, window, high_projection)
        super().__init__(Shortcut(joint, split) if shortcut else split, joint, gate, dropout, last)


class Shortcut(nn.Module):
    """Patches beside what a branch makes of them: s ⊙ x + f(x), s from 1, SPANet's ResScale; (B, h, w, E) kept."""

    def __init__(self, joint: int, branch: nn.Module):
        super().__init__()
        self.branch, self.scale_E = branch, nn.Parameter(torch.ones(joint))

    def forward(self, x_BhwE: Tensor) -> Tensor:
        return self.scale_E * x_BhwE + self.branch(x_BhwE)


class BalancedFrequencies(nn.Module):
    """SPANet's mixer on a grid of patches: SPAM(norm x), (B, h, w, E) -> the same."""

    def __init__(self, joint: int, radius: float, low_weights: tuple[float, ...]):
        super().__init__()
        self.norm, self.spam = map_norm(joint), SPAM(joint, radius, low_weights)

    def forward(self, x_BhwE: Tensor) -> Tensor:
        return self.spam(self.norm(x_BhwE.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class BalancedAttention(GuidedAttention):
    """The same layer with frequencies balanced by SPANet's mixer instead of split."""

    def __init__(self, joint, radius, low_weights, gate, dropout, last, shortcut):
        balanced = BalancedFrequencies(joint, radius, low_weights)
        super().__init__(Shortcut(joint, balanced) if shortcut else balanced, joint, gate, dropout, last)


class CrossAttention(nn.Module):
    """ZegCLIP's layer: classes attend to patches; the scaled logits, averaged over heads, are the masks.

    The mean over heads of q_h·k_h / √d is one product over all channels divided by heads·√d.
    Shapes: as `GuidedAttention`.
    """

    def __init__(self, joint, heads, last):
        super().__init__()
        self.heads = heads
        self.scale = (joint // heads) ** -0.5 / heads
        self.q, self.k = nn.Linear(joint, joint), nn.Linear(joint, joint)
        self.v, self.project = (None, None) if last else (nn.Linear(joint, joint), nn.Linear(joint, joint))

    def forward(self, query_BKE: Tensor, patches_BhwE: Tensor) -> tuple[Tensor, Tensor | None]:
        patches_BNE = patches_BhwE.flatten(1, 2)
        q, k = self.q(query_BKE), self.k(patches_BNE)
        logits_BKN = (q * self.scale) @ k.transpose(1, 2)
        if self.v is None:
            return logits_BKN, None
        q, k, v = (split_heads(x, self.heads) for x in (q, k, self.v(patches_BNE)))
        return logits_BKN, self.project(join_heads(attend(q, k, v)))


class QueryUpdate(nn.Module):
    """Residual, norm and a 4× ReLU network after a layer's attention: (B, K, E) twice -> (B, K, E)."""

    def __init__(self, joint: int, dropout: float):
        super().__init__()
        self.norm_attention, self.norm_network = nn.LayerNorm(joint), nn.LayerNorm(joint)
        self.widen, self.narrow = nn.Linear(joint, 4 * joint), nn.Linear(4 * joint, joint)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query_BKE: Tensor, update_BKE: Tensor) -> Tensor:
        query_BKE = self.norm_attention(query_BKE + self.dropout(update_BKE))
        hidden = self.dropout(F.relu(self.widen(query_BKE)))
        return self.norm_network(query_BKE + self.dropout(self.narrow(hidden)))


class MaskDecoder(nn.Module):
    """Class masks from patch, global and text embeddings.

    Shapes: patches (B, h, w, E), global (B, E), text (K, E) -> mask logits (B, K, h, w).
    `attentions` are the layers' attention modules; all but the last one update the queries.
    """

    def __init__(self, joint: int, attentions: list[nn.Module], dropout: float):
        super().__init__()
        self.descriptor = RelationshipDescriptor(joint)
        self.attentions = nn.ModuleList(attentions)
        self.updates = nn.ModuleList(QueryUpdate(joint, dropout) for _ in attentions[:-1])

    def forward(self, patches_BhwE: Tensor, global_BE: Tensor, class_text_KE: Tensor) -> Tensor:
        query_BKE = self.descriptor(class_text_KE, global_BE)
        for attention, update in zip(self.attentions, self.updates):
            _, change_BKE = attention(query_BKE, patches_BhwE)
            query_BKE = update(query_BKE, change_BKE)
        logits_BKN, _ = self.attentions[-1](query_BKE, patches_BhwE)
        return logits_BKN.unflatten(-1, patches_BhwE.shape[1:3])
