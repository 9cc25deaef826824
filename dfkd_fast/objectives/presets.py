"""Term weights of published methods. Both sides minimize their sums, so a negative weight maximizes a term.

For methods of other papers, only the losses follow the paper. The numbers of generator and student steps come from
the config, and L_BN is Eq. 3 of Shao et al.
"""

from __future__ import annotations

from dataclasses import dataclass

from dfkd_fast.registry import Registry

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Weights of the generator's and the student's terms, and the publication."""

    generator: dict[str, float]
    student: dict[str, float]
    source: str


PRESETS: Registry[Preset] = Registry("preset", "ObjectiveConfig.preset")
"""The presets by name. ``PRESETS.register(name)(Preset(...))`` adds one."""

PRESETS.update(
    {
        "dfkd-fgvc": Preset(
            generator={"bn": 0.3, "kd": -1.0},
            student={"kd": 1.0, "mhad": 10.0, "sfcl": 8.0},
            source="Shao et al., ICCV 2023, Eq. 10 and 11",
        ),
        "baseline": Preset(
            generator={"bn": 0.3, "kd": -1.0},
            student={"kd": 1.0},
            source="Shao et al., ICCV 2023, table 3, first row",
        ),
        "dfad": Preset(
            generator={"l1": -1.0},
            student={"l1": 1.0},
            source="Fang et al., Data-Free Adversarial Distillation, 2019",
        ),
        "dafl": Preset(
            generator={"one_hot": 1.0, "activation": 0.1, "balance": 5.0},
            student={"kd": 1.0},
            source="Chen et al., Data-Free Learning of Student Networks, ICCV 2019",
        ),
        "zskt": Preset(
            generator={"kd": -1.0},
            student={"kd": 1.0, "attention_transfer": 250.0},
            source="Micaelli and Storkey, Zero-shot Knowledge Transfer, NeurIPS 2019",
        ),
        "dfq": Preset(
            generator={"bn": 1.0, "one_hot": 1.0, "balance": 1.0, "kd": -1.0},
            student={"kd": 1.0},
            source="Choi et al., Data-Free Network Quantization With Adversarial KD, CVPRW 2020; unit weights",
        ),
    }
)
