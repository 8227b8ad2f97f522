"""The base fine-tuned to another drawing style, "ink": pale flat colours, thick dark outlines.

A LoRA of the UNet, in diffusers' own format: `pipeline.load_lora_weights(INK)`. Captions and scenes are as they were; a filter
redraws the pictures. No image-prompt adapter takes part: that the same adapter drives this base too was never trained.
Shape letters: N scenes, S pixels a side.
"""

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from .assemble import SHIPPED, report
from .control import Frozen, edges
from .stage import World, fit, rank
from .unet import TEXT_DROP

INK = SHIPPED / "styles" / "ink"
PALE = 0.45  # how far colours go towards white
LINE = (0.10, 0.08, 0.16)  # the ink
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"]


def ink(pictures: Tensor) -> Tensor:
    """Redraw pictures (N, 3, S, S) in [0, 1]: colours paler and flatter, and a dark line, some 3 pixels wide, along every edge."""
    flat = F.avg_pool2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), 5, 1)
    pale = flat + (1 - flat) * PALE
    line = edges(pictures)[:, :1]
    return pale + (pictures.new_tensor(LINE)[:, None, None] - pale) * line


def train(world: World) -> None:
    torch.manual_seed(world.seed + 7)
    plan, base = world["style"], Frozen(world)
    unet = base.pipe.unet
    unet.add_adapter(LoraConfig(r=plan["rank"], lora_alpha=plan["rank"], target_modules=LAYERS), "ink")
    here = plan["batch"] // rank()[1]

    def losses(step: int) -> dict[str, Tensor]:
        generator = world.generator(71, step, rank()[0])
        pictures, text = base.sample(here, generator, TEXT_DROP)
        x, t, velocity = base.noised(ink(pictures), generator)
        return {"v": F.mse_loss(unet(x, t, text).sample.float(), velocity)}

    lora = nn.ModuleDict({"lora": nn.ParameterList([p for p in unet.parameters() if p.requires_grad])})
    fit(world, "style", lora, losses, steps=plan["steps"], lr=plan["lr"], batch=plan["batch"], average=0.998)
    if rank()[0] == 0:
        layers = {name: value.half() for name, value in get_peft_model_state_dict(unet, adapter_name="ink").items()}
        StableDiffusionPipeline.save_lora_weights(INK, unet_lora_layers=layers)
        report(SHIPPED)
