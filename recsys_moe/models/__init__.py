"""The model families: one file each. `MODELS` is the registry."""

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from recsys_moe.models.home import HoME, HoMEConfig
from recsys_moe.models.mmoe import MMoE, MMoEConfig
from recsys_moe.models.shared_bottom import SharedBottom, SharedBottomConfig

ModelConfig = Annotated[SharedBottomConfig | MMoEConfig | HoMEConfig, Field(discriminator="name")]

MODELS: dict[type[Any], type[nn.Module]] = {
    SharedBottomConfig: SharedBottom,
    MMoEConfig: MMoE,
    HoMEConfig: HoME,
}
