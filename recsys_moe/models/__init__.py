"""The model families: one file each. `MODELS` is the registry."""

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from recsys_moe.models.adatt import AdaTT, AdaTTConfig
from recsys_moe.models.home import HoME, HoMEConfig
from recsys_moe.models.mmoe import MMoE, MMoEConfig
from recsys_moe.models.ple import PLE, PLEConfig
from recsys_moe.models.shared_bottom import SharedBottom, SharedBottomConfig

ModelConfig = Annotated[SharedBottomConfig | MMoEConfig | PLEConfig | AdaTTConfig | HoMEConfig, Field(discriminator="name")]

MODELS: dict[type[Any], type[nn.Module]] = {
    SharedBottomConfig: SharedBottom,
    MMoEConfig: MMoE,
    PLEConfig: PLE,
    AdaTTConfig: AdaTT,
    HoMEConfig: HoME,
}
