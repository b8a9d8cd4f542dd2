"""What a loss may be asked for."""

from __future__ import annotations

from lowrank.ops.cross_entropy import LossOptions

OPTIONS = {
    "plain": LossOptions(),
    "softcap": LossOptions(softcap=2.0),
    "scaled": LossOptions(logit_scale=0.3),
    "smoothed": LossOptions(label_smoothing=0.1),
    "z-loss": LossOptions(z_loss=0.01),
    "all": LossOptions(logit_scale=0.3, softcap=2.0, label_smoothing=0.1, z_loss=0.01),
}
