"""Term weights of published methods. Both sides minimize their sums, so a negative weight maximizes a term.

The packaged config ``methods/NAME.yaml`` has the rest of a method: loop, rates, temperature, generator and synthesizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from dfkd_fast.registry import Registry

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Weights of the generator's and the student's terms.

    Attributes:
        generator: weights of the generator's terms.
        student: weights of the student's terms.
        source: the publication.
        prior: what the method uses of the teacher besides its logits.
    """

    generator: dict[str, float]
    student: dict[str, float]
    source: str
    prior: str = ""


PRESETS: Registry[Preset] = Registry("preset", "ObjectiveConfig.preset")
"""The presets by name. ``PRESETS.register(name)(Preset(...))`` adds one."""

_STATISTICS = "BatchNorm statistics"
_POOL = {"bn": 10.0, "target": 0.5, "masked_kl": -1.33}

PRESETS.update(
    {
        "dfkd-fgvc": Preset(
            generator={"bn": 0.3, "kd": -1.0},
            student={"kd": 1.0, "mhad": 10.0, "sfcl": 8.0},
            source="Shao et al., ICCV 2023, Eq. 10 and 11",
            prior=f"{_STATISTICS}, features",
        ),
        "baseline": Preset(
            generator={"bn": 0.3, "kd": -1.0},
            student={"kd": 1.0},
            source="Shao et al., ICCV 2023, table 3, first row",
            prior=_STATISTICS,
        ),
        "dfad": Preset(
            generator={"l1": -1.0},
            student={"l1": 1.0},
            source="Fang et al., Data-Free Adversarial Distillation, 2019",
        ),
        "dafl": Preset(
            generator={"one_hot": 1.0, "activation": 0.1, "balance": 20.0},
            student={"kd": 1.0},
            source="Chen et al., Data-Free Learning of Student Networks, ICCV 2019; weights of DataFree",
            prior="penultimate features",
        ),
        "zskt": Preset(
            generator={"kd": -1.0},
            student={"kd": 1.0},
            source="Micaelli and Storkey, Zero-shot Knowledge Transfer, NeurIPS 2019; without attention transfer",
        ),
        "dfq": Preset(
            generator={"bn": 1.0, "one_hot": 1.0, "balance": 20.0, "kd": -1.0},
            student={"kd": 1.0},
            source="Choi et al., Data-Free Network Quantization With Adversarial KD, CVPRW 2020; weights of DataFree",
            prior=_STATISTICS,
        ),
        "mad": Preset(
            generator={"bn": 0.3, "kd": -1.0},
            student={"kd": 2.0},  # the mean over both batches; 1 for each
            source="Do et al., Momentum Adversarial Distillation, NeurIPS 2022; with L_BN, as in Shao et al.",
            prior=_STATISTICS,
        ),
        "zskd": Preset(
            generator={"target": 1.0},
            student={"kd": 1.0},
            source="Nayak et al., Zero-Shot Knowledge Distillation, ICML 2019",
            prior="weights of the last layer",
        ),
        "adi": Preset(
            generator={"target": 1.0, "bn": 0.05, "variation": 1e-4, "l2": 1e-5, "js": 0.2},
            student={"kd": 1.0},
            source="Yin et al., Dreaming to Distill (DeepInversion), CVPR 2020",
            prior=_STATISTICS,
        ),
        "cmi": Preset(
            generator={"bn": 1.0, "target": 0.5, "masked_kl": -0.5, "contrast": 0.8},
            student={"kd": 1.0},
            source="Fang et al., Contrastive Model Inversion, IJCAI 2021",
            prior=f"{_STATISTICS}, features",
        ),
        "fast": Preset(
            generator=_POOL,
            student={"kd": 1.0},
            source="Fang et al., Up to 100x Faster Data-free Knowledge Distillation, AAAI 2022",
            prior=_STATISTICS,
        ),
        "nayer": Preset(
            generator=_POOL,
            student={"kd": 1.0},
            source="Tran et al., NAYER, CVPR 2024",
            prior=f"{_STATISTICS}, names of the classes",
        ),
    }
)
