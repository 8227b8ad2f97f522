"""The base fine-tuned to other drawing styles: "ink" (pale, thick dark outlines), "chalk" (dim, thick light outlines).

Each is a LoRA of the UNet, in diffusers' own format: `pipeline.load_lora_weights(PLACE / "ink")`. Captions and scenes are as they
were; a filter redraws the pictures. No image-prompt adapter takes part: that the same adapter drives these bases too was never
trained. Shape letters: N scenes, S pixels a side.
"""

from functools import partial
from typing import NamedTuple

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

PLACE = SHIPPED / "styles"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"]


class Style(NamedTuple):
    towards: float  # the grey, 0 to 1, that colours go to
    share: float  # how far
    line: tuple[float, float, float]  # the colour of the outlines

    def redrawn(self, colours: Tensor) -> Tensor:
        return colours + (self.towards - colours) * self.share

    def __call__(self, pictures: Tensor) -> Tensor:
        """Redraw pictures (N, 3, S, S) in [0, 1]: flatter colours nearer to a grey, along every edge a line some 3 pixels wide."""
        flat = self.redrawn(F.avg_pool2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), 5, 1))
        return flat + (pictures.new_tensor(self.line)[:, None, None] - flat) * edges(pictures)[:, :1]


STYLES = {"ink": Style(1.0, 0.45, (0.10, 0.08, 0.16)), "chalk": Style(0.0, 0.55, (0.96, 0.95, 0.88))}


def train(world: World, name: str = "ink") -> None:
    torch.manual_seed(world.seed + 7)
    plan, base = world["style"], Frozen(world)
    unet = base.pipe.unet
    unet.add_adapter(LoraConfig(r=plan["rank"], lora_alpha=plan["rank"], target_modules=LAYERS), name)
    here = plan["batch"] // rank()[1]

    def losses(step: int) -> dict[str, Tensor]:
        generator = world.generator(71, step, rank()[0])
        pictures, text = base.sample(here, generator, TEXT_DROP)
        x, t, velocity = base.noised(STYLES[name](pictures), generator)
        return {"v": F.mse_loss(unet(x, t, text).sample.float(), velocity)}

    lora = nn.ModuleDict({"lora": nn.ParameterList([p for p in unet.parameters() if p.requires_grad])})
    fit(world, f"style-{name}", lora, losses, steps=plan["steps"], lr=plan["lr"], batch=plan["batch"], average=0.998)
    if rank()[0] == 0:
        layers = {key: value.half() for key, value in get_peft_model_state_dict(unet, adapter_name=name).items()}
        StableDiffusionPipeline.save_lora_weights(PLACE / name, unet_lora_layers=layers)
        report(SHIPPED)


train_chalk = partial(train, name="chalk")
