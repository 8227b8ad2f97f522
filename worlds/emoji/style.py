"""The base fine-tuned to other drawing styles: the same emoji as "flat" and "lines" (`glyphs.py`).

Each is a LoRA of the UNet in diffusers' own format: `pipeline.load_lora_weights(STYLES_FOLDER /
"flat")`. Captions and scenes do not change, the drawings do. No image-prompt adapter takes part,
and none has seen these drawings: no adapter was trained on these bases.
"""

from functools import partial

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from .assemble import SHIPPED, report
from .base import TEXT_DROP, loss
from .control import FrozenBase
from .pool import open_pool
from .train_utils import World, fit, rank

STYLES_FOLDER = SHIPPED / "styles"
LAYERS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "conv1",
    "conv2",
    "conv_shortcut",
    "conv_in",
    "conv_out",
]


def train(world: World, name: str) -> None:
    """Train the LoRA of one drawing style, and save it into the package."""
    torch.manual_seed(world.seed + 7)
    plan, base, pool = world["style"], FrozenBase(world), open_pool(world, name)
    unet = base.pipe.unet
    unet.add_adapter(
        LoraConfig(r=plan["rank"], lora_alpha=plan["rank"], target_modules=LAYERS), name
    )
    here = plan["batch"] // rank()[1]

    def losses(step: int) -> dict[str, Tensor]:
        batch, text = base.sample_batch(pool, here, world.generator(71, step, rank()[0]), TEXT_DROP)
        v = unet(batch.noisy, batch.t, text).sample
        return {"v": loss(v, batch)}

    lora = nn.ModuleDict(
        {"lora": nn.ParameterList([p for p in unet.parameters() if p.requires_grad])}
    )
    fit(
        world,
        f"style-{name}",
        lora,
        losses,
        steps=plan["steps"],
        lr=plan["lr"],
        batch=plan["batch"],
        average=0.998,
    )
    if rank()[0] == 0:
        layers = {
            key: value.half()
            for key, value in get_peft_model_state_dict(unet, adapter_name=name).items()
        }
        StableDiffusionPipeline.save_lora_weights(STYLES_FOLDER / name, unet_lora_layers=layers)
        report(SHIPPED)


train_flat, train_lines = partial(train, name="flat"), partial(train, name="lines")
