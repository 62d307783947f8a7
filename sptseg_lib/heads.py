"""Heads: masks from one product of patches and class texts, where no decoder stands between them.

Shapes of all: patches (B, h, w, E) and global (B, E) of unit length, text (K, E) -> mask logits (B, K, h, w).
"""

import torch
from torch import Tensor, nn

SAME_TEXT = 1e-2  # distance of unit vectors below which two texts are one, computed on other hardware perhaps


def patch_scores(patches_BhwE: Tensor, row_KE: Tensor) -> Tensor:
    """Products of patches and classifier rows: (B, h, w, E), (K, E) -> (B, K, h, w)."""
    return (patches_BhwE @ row_KE.T).permute(0, 3, 1, 2)


class CosineHead(nn.Module):
    """Logits = s · (cos(z, t) − c), that is s · cos + b with b = −s·c    [CLIP, fig. 3; with b SigLIP, eq. 1]

    s and c are learned. c as a threshold on the cosine, not b, lets a step of the learning rate move it by as much as
    it moves a cosine. Softmax knows no offset common to all classes: `threshold=False` leaves c out.
    """

    def __init__(self, threshold: bool = True):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(20.0).log())
        self.threshold = nn.Parameter(torch.tensor(0.25)) if threshold else 0.0

    def forward(self, patches_BhwE: Tensor, global_BE: Tensor, class_text_KE: Tensor) -> Tensor:
        return self.log_scale.exp() * (patch_scores(patches_BhwE, class_text_KE) - self.threshold)


class LinearProbe(CosineHead):
    """A linear classifier on the patches: row_k = t_k + o_k, o_k learned for classes of training, 0 for all others.

    Rows start at the class texts and belong to them: a class is known by its text, whatever its place in a list.
    `remember` says which classes are trained; before, there is none.
    """

    def __init__(self, joint: int, threshold: bool = True):
        super().__init__(threshold)
        self.register_buffer("text_SE", torch.zeros(0, joint))
        self.offset_SE = nn.Parameter(torch.zeros(0, joint))

    def offset(self, class_text_KE: Tensor) -> Tensor:
        """What was learned for each of these texts, 0 where nothing was: (K, E) -> (K, E)."""
        with torch.autocast(class_text_KE.device.type, enabled=False):
            same_KS = torch.cdist(class_text_KE, self.text_SE) < SAME_TEXT
            return same_KS.to(self.offset_SE.dtype) @ self.offset_SE

    @torch.no_grad()
    def remember(self, class_text_KE: Tensor) -> None:
        """Let these classes be trained, from what was learned for their texts before: (K, E)."""
        offset_KE = self.offset(class_text_KE)
        self.text_SE, self.offset_SE = class_text_KE.clone(), nn.Parameter(offset_KE)

    def forward(self, patches_BhwE: Tensor, global_BE: Tensor, class_text_KE: Tensor) -> Tensor:
        return super().forward(patches_BhwE, global_BE, class_text_KE + self.offset(class_text_KE))


class SemanticProjection(nn.Module):
    """Logits = tᵀ(W z + b): patches are carried into the space of texts, which stay fixed    [SPNet, Xian et al. 2019]

    W is drawn at random: the method takes visual and text features for strangers, as they were before CLIP.
    """

    def __init__(self, joint: int):
        super().__init__()
        self.project = nn.Linear(joint, joint)

    def forward(self, patches_BhwE: Tensor, global_BE: Tensor, class_text_KE: Tensor) -> Tensor:
        return patch_scores(self.project(patches_BhwE), class_text_KE)
