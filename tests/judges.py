"""Tiny judges in folders, as users give them."""

import warnings
from pathlib import Path

import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from tests.parts import tiny_tokenizer
from tests.tiny import seeded

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_clip(folder: Path) -> Path:
    """A whole CLIP of 12-wide embeddings, whose random weights are large enough to tell pictures
    apart.
    """
    tokenizer = tiny_tokenizer()
    text = {
        **SMALL,
        "intermediate_size": 24,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
    }
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {**SMALL, "intermediate_size": 24, "image_size": 32, "patch_size": 8}
    with seeded(1):
        model = CLIPModel(
            CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=12)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_dino(folder: Path) -> Path:
    """A vision transformer without the head that DINO's have not."""
    with seeded(2):
        config = ViTConfig(**SMALL, intermediate_size=24, image_size=32, patch_size=8)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def tiny_dinov2(folder: Path) -> Path:
    with seeded(3):
        Dinov2Model(Dinov2Config(**SMALL, image_size=28, patch_size=14)).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)
    return folder


class Inception(torch.nn.Module):
    """What the published TorchScript file takes and gives, with 6 features: sums of colours, and of
    their squares.
    """

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        assert img.dtype == torch.uint8
        values = img.float() / 255
        return torch.cat([values.mean([2, 3]), values.square().mean([2, 3])], 1)


def tiny_inception(path: Path) -> Path:
    with warnings.catch_warnings():
        # of torch, which would rather have another format
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Inception()).save(path)
    return path
