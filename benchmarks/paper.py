"""The paper's training loop, written again from its published scripts.

Each step does the same work in the same order as tutorial_train.py and tutorial_train_sdxl.py of
https://github.com/tencent-ailab/IP-Adapter. Frozen encoders run in every step in the low precision
(SDXL's VAE in float32); the UNet's weights stay in float32 and compute under autocast; AdamW has
its defaults; the loss is gathered and read in every step. Attention and projection are those of the
authors' package (ip-adapter 0.1.0).

Shape letters as in `imprompt.training.features`.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks import random_models
from benchmarks.setting import TrainingSetting

TOKENS = 4
DROPS = 0.05  # each of image, text and both


class PaperLoop:
    """Steps of the paper's loop at a setting."""

    def __init__(self, setting: TrainingSetting) -> None:
        from accelerate import Accelerator

        of, low = setting.models, random_models.DTYPES[setting.precision]
        self.setting, self.low = setting, low
        mixed_precision = "no" if setting.precision == "fp32" else setting.precision
        self.accelerator = Accelerator(mixed_precision=mixed_precision, cpu=setting.device == "cpu")
        with torch.device(setting.device):
            self.vae = random_models.vae(of, torch.float32 if of.pooled else low)
            self.texts = random_models.text_encoders(of, low)
            self.image_encoder = random_models.image_encoder(of, low)
            model = inject(random_models.unet(of, torch.float32), of.vision["projection_dim"])
        optimizer = torch.optim.AdamW(
            [*model.image_proj_model.parameters(), *model.adapter_modules.parameters()], 1e-4
        )
        data = DataLoader(
            PaperData(setting), batch_size=setting.batch, shuffle=True, collate_fn=collate
        )
        self.model, self.optimizer, self.data = self.accelerator.prepare(model, optimizer, data)
        self.scheduler: Any = DDPMScheduler(**random_models.NOISE)
        self.batches = self._batches()

    def run(self, steps: int) -> float:
        """Take `steps` steps; return the last one's loss."""
        loss = float("nan")
        for _ in range(steps):
            loss = self._step(next(self.batches))
        return loss

    def _batches(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.data

    def _step(self, batch: dict[str, Any]) -> float:
        with self.accelerator.accumulate(self.model):
            with torch.no_grad():
                latents = self.vae.encode(batch["pixels"].to(self.vae.dtype)).latent_dist.sample()
                latents = (latents * self.vae.config.scaling_factor).to(self.low)
            noise = torch.randn_like(latents)
            t = torch.randint(
                0, self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
            )
            noisy = self.scheduler.add_noise(latents, noise, t)
            with torch.no_grad():
                embeds = self.image_encoder(batch["reference"].to(self.low)).image_embeds
            embeds = torch.stack(
                [
                    torch.zeros_like(one) if drop == 1 else one
                    for one, drop in zip(embeds, batch["drop"], strict=True)
                ]
            )
            text, added = self._text(batch)
            prediction = self.model(noisy, t, text, embeds, added)
            loss = F.mse_loss(prediction.float(), noise.float())
            mean_loss = self.accelerator.gather(loss.repeat(self.setting.batch)).mean().item()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return mean_loss

    @torch.no_grad()
    def _text(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Encode the captions (B, T, D), and return them with SDXL's added conditions."""
        if len(self.texts) == 1:
            return self.texts[0](batch["ids"])[0], None
        outs = [encoder(batch["ids"], output_hidden_states=True) for encoder in self.texts]
        text = torch.cat([out.hidden_states[-2] for out in outs], -1)
        return text, {
            "text_embeds": outs[-1].text_embeds,
            "time_ids": batch["time_ids"].to(self.low),
        }


class PaperModel(nn.Module):
    """UNet, projection and attention processors in one module.

    The paper's script gives them to accelerate in this form.
    """

    def __init__(
        self, unet: nn.Module, image_proj_model: nn.Module, adapter_modules: nn.ModuleList
    ) -> None:
        super().__init__()
        self.unet, self.image_proj_model, self.adapter_modules = (
            unet,
            image_proj_model,
            adapter_modules,
        )

    def forward(
        self,
        noisy: Tensor,
        t: Tensor,
        text: Tensor,
        embeds: Tensor,
        added: dict[str, Tensor] | None,
    ) -> Tensor:
        """Predict the noise.

        Takes noisy latents, timesteps, text (B, T, D), image embeddings (B, E) and SDXL's
        conditions.
        """
        together = torch.cat([text, self.image_proj_model(embeds)], 1)
        return self.unet(noisy, t, together, added_cond_kwargs=added).sample


def inject(unet: Any, embedding_dim: int) -> PaperModel:
    """Inject the authors' classes into a UNet; W'_k and W'_v start from the text's."""
    package = paper_package()
    processors: dict[str, nn.Module] = {}
    for name in unet.attn_processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn1.processor"):
            processors[name] = package.AttnProcessor()
            continue
        processors[name] = package.IPAttnProcessor(
            attention.to_k.out_features, unet.config.cross_attention_dim, num_tokens=TOKENS
        )
        processors[name].load_state_dict(
            {
                "to_k_ip.weight": attention.to_k.weight.detach(),
                "to_v_ip.weight": attention.to_v.weight.detach(),
            }
        )
    unet.set_attn_processor(dict(processors))
    projection = package.ImageProjModel(unet.config.cross_attention_dim, embedding_dim, TOKENS)
    return PaperModel(unet, projection, nn.ModuleList(processors.values()))


def paper_package() -> Any:
    """Import the authors' module, with its kernels for PyTorch 2.

    It imports a name that current diffusers no longer has, which is added for the import.
    """
    with patch(
        "diffusers.pipelines.controlnet.MultiControlNetModel", MultiControlNetModel, create=True
    ):
        return import_module("ip_adapter.ip_adapter")


class PaperData(Dataset[dict[str, Any]]):
    """Random pictures and captions in the form that the script's workers give.

    Pictures are already decoded, cropped and normalised, and captions tokenised.
    """

    def __init__(self, setting: TrainingSetting) -> None:
        of, count = setting.models, setting.samples
        self.pixels = torch.rand(count, 3, setting.pixels, setting.pixels) * 2 - 1
        self.reference = torch.randn(count, 3, of.image_side, of.image_side)
        self.ids = torch.randint(1000, (count, of.base.text_tokens))
        self.time_ids = torch.tensor(
            [setting.pixels, setting.pixels, 0, 0, setting.pixels, setting.pixels]
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        drop = torch.rand(()).item()
        return {
            "pixels": self.pixels[index],
            "reference": self.reference[index],
            "ids": self.ids[index] * int(not DROPS <= drop < 3 * DROPS),
            "drop": int(drop < DROPS or 2 * DROPS <= drop < 3 * DROPS),
            "time_ids": self.time_ids,
        }


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch items; drops stay numbers on the CPU, as in the script.

    Reading them waits for no device.
    """
    return default_collate(items) | {"drop": [item["drop"] for item in items]}
