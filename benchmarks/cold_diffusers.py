"""Follow a picture with the packaged model by a script of diffusers, like `imprompt generate`.

python -m benchmarks.cold_diffusers ADAPTER PICTURE OUT DEVICE   # ADAPTER in the paper's layout
"""

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from imprompt.models import MODELS, PACKAGED


def main(adapter: str, picture: str, out: str, device: str) -> None:
    """Generate one picture from an image prompt and save it as `out`."""
    known, file = MODELS["emoji"], Path(adapter)
    dtype = torch.float16 if device == "cuda" else torch.float32  # as imprompt chooses
    pipe = StableDiffusionPipeline.from_pretrained(PACKAGED / "emoji", dtype=dtype).to(device)
    pipe.load_ip_adapter(
        str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None
    )
    made: Any = pipe(
        "",
        ip_adapter_image=Image.open(picture).convert("RGB"),
        num_inference_steps=known.steps,
        guidance_scale=known.guidance,
        generator=torch.Generator().manual_seed(7),
    )
    made.images[0].save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
