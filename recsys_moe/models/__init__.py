"""The model families: one file each. `MODELS` is the registry."""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from recsys_moe.front import check_attention
from recsys_moe.models.adatt import AdaTT, AdaTTConfig
from recsys_moe.models.aitm import AITM, AITMConfig, check_chain
from recsys_moe.models.esmm import ESMM, ESMMConfig, settle_conversions
from recsys_moe.models.family import Family
from recsys_moe.models.home import HoME, HoMEConfig
from recsys_moe.models.mmoe import MMoE, MMoEConfig
from recsys_moe.models.ple import PLE, PLEConfig
from recsys_moe.models.shared_bottom import SharedBottom, SharedBottomConfig
from recsys_moe.models.single_task import SingleTask, SingleTaskConfig
from recsys_moe.models.stem import STEM, STEMConfig
from recsys_moe.schema import Categorical, Cross, Hashed, Schema, Sequence

ModelConfig = Annotated[
    SingleTaskConfig
    | SharedBottomConfig
    | MMoEConfig
    | PLEConfig
    | ESMMConfig
    | AITMConfig
    | AdaTTConfig
    | STEMConfig
    | HoMEConfig,
    Field(discriminator="name"),
]

MODELS: dict[type[Any], type[Family]] = {
    SingleTaskConfig: SingleTask,
    SharedBottomConfig: SharedBottom,
    MMoEConfig: MMoE,
    PLEConfig: PLE,
    ESMMConfig: ESMM,
    AITMConfig: AITM,
    AdaTTConfig: AdaTT,
    STEMConfig: STEM,
    HoMEConfig: HoME,
}


def settle(config: Any, schema: Schema) -> Any:
    """`config` with what the schema knows: HoME's categories and ESMM's conversions, where it names none.

    Raises:
        UserError: ESMM's or AITM's tasks are not what these models are for; attention over or for what is no such feature.

    >>> from recsys_moe.schema import BinaryTask, Categorical
    >>> tasks = BinaryTask("click", "c", category="interaction"), BinaryTask("buy", "b", mask="c", category="purchase")
    >>> schema = Schema((Categorical("x", "categorical"),), tasks)
    >>> settle(HoMEConfig(), schema).categories, settle(ESMMConfig(), schema).conversions
    ({'click': 'interaction', 'buy': 'purchase'}, {'buy': 'click'})
    """
    sequences = [f.name for f in schema.features if isinstance(f, Sequence)]
    check_attention(config.front, sequences, [f.name for f in schema.features if isinstance(f, Categorical | Hashed | Cross)])
    if isinstance(config, HoMEConfig) and config.categories is None:
        return replace(config, categories={task.name: task.category for task in schema.tasks})
    if isinstance(config, ESMMConfig):
        return settle_conversions(config, schema)
    if isinstance(config, AITMConfig):
        check_chain(config, schema)
    return config
