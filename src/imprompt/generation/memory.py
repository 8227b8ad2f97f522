"""Save GPU memory: 8-bit matrices of the base model, tiled decoding, weights offloaded when idle.

The methods are the libraries' own (torchao, diffusers, accelerate). This module chooses which of
them is used for which part, and in which order: open the pipeline on the CPU, call
`quantize_and_tile`, attach the adapter, then `place` both.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from imprompt.errors import SettingError, first_line
from imprompt.families.base import base_of, family_of

GROUP = (
    64  # weights that share an int8 scale; every width of the published models is a multiple of it
)


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup

    # With groups, torchao scales the weights before it multiplies. With rows it scales the product,
    # which overflows in float16.
    return Int8WeightOnlyConfig(granularity=PerGroup(GROUP), set_inductor_config=False)


def _fp8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig(set_inductor_config=False)  # float8_e4m3fn, a scale for each row


QUANTIZERS: dict[str, Callable[[], Any]] = {"int8": _int8, "fp8": _fp8}
OFFLOADS: dict[str, Callable[[Any, str], None]] = {  # (pipeline, device)
    "model": lambda pipeline, device: pipeline.enable_model_cpu_offload(device=device),
    "sequential": lambda pipeline, device: pipeline.enable_sequential_cpu_offload(device=device),
}


@dataclass(frozen=True)
class MemoryOptions:
    """Options that save memory on `device`, where the pictures are made."""

    device: str
    offload: str | None = (
        None  # "model": one network at a time on the device; "sequential": one layer at a time
    )
    tiling: bool = False  # decode pictures one by one, large ones in tiles
    quantize: str | None = (
        # "int8" or "fp8": the base model's matrices; arithmetic stays in the pipeline's precision
        None
    )

    @classmethod
    def check(
        cls,
        device: str,
        offload: str | None = None,
        tiling: bool = False,
        quantize: str | None = None,
    ) -> Self:
        """Return checked options, before any weights are read.

        Raise SettingError for an unknown name, or for what `device` cannot do.
        """
        for name, value, known in (
            ("offload", offload, OFFLOADS),
            ("quantize", quantize, QUANTIZERS),
        ):
            if value is not None and value not in known:
                raise SettingError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if offload is not None and torch.device(device).type == "cpu":
            raise SettingError(
                f"offload = {offload!r} spares a GPU's memory; the device here is {device}: leave "
                "it out"
            )
        if quantize is not None:
            check_quantizer(quantize, device)
        return cls(device, offload, tiling, quantize)

    @property
    def opens_on(self) -> str:
        """Device to open the pipeline on.

        It is the CPU if weights are changed before they go to the device.
        """
        return "cpu" if self.offload or self.quantize else self.device

    def quantize_and_tile(self, pipeline: Any) -> None:
        """Quantize the base model and set tiling; call it before the adapter is attached."""
        if self.quantize is not None:
            # One matrix at a time: the device never holds the whole model in full precision, and
            # under offload it holds none of it.
            quantize(base_of(pipeline), self.quantize, None if self.offload else self.device)
        if self.tiling:
            pipeline.vae.enable_slicing()
            pipeline.vae.enable_tiling()

    def place(self, pipeline: Any, *adapters: Any) -> None:
        """Move the pipeline and its adapters to the device.

        Under offload, make each part move there only while it computes.
        """
        if self.offload is None:
            for part in (pipeline, *adapters):
                part.to(self.device)
            return
        OFFLOADS[self.offload](pipeline, self.device)
        for adapter in adapters:
            for part in (adapter.projection, *adapter.image_kv):
                visit(part, self.device)
            if adapter.low_rank is not None:
                adapter.low_rank.to(self.device)  # every attention layer uses it in every step

    def to_device(self, network: nn.Module) -> None:
        """Move a network that is not the pipeline's own, such as a ControlNet, to the device.

        Under offload, make it move there only while it computes.
        """
        if self.offload is None:
            network.to(self.device)
        elif self.offload == "sequential":  # "model" is set up for its pipeline by `again`
            visit(network, self.device)

    def again(self, pipeline: Any) -> None:
        """Set up "model" offload for another pipeline over the same networks.

        That pipeline must know which networks to offload when it is done.
        """
        if self.offload == "model":
            OFFLOADS[self.offload](pipeline, self.device)

    def offload_encoder(self, encoder: nn.Module) -> None:
        """Keep the image encoder on the device only while it encodes, under offload."""
        if self.offload is not None:
            visit(encoder, self.device)


def quantize(model: nn.Module, how: str, device: str | None = None) -> None:
    """Convert the matrices of a base model's attention blocks to 8 bits.

    Each goes to `device`, if one is given, before it is rounded. These matrices are nearly all
    weights of a large transformer, 86 % of SDXL's and 28 % of SD 1.5's; convolutions and the layers
    outside these blocks, such as those of the timestep, stay as they are. A matrix reports the
    precision that it computes in as its dtype. Raise SettingError if no matrix can be converted.
    """
    from torchao.quantization import quantize_

    chosen = {name for name, _ in quantizable(model)}
    if not chosen:
        raise SettingError(
            f"quantize = {how!r} converts matrices whose width is a multiple of {GROUP}, and the "
            f"blocks of this {type(model).__name__} have none: leave it out"
        )
    quantize_(model, QUANTIZERS[how](), lambda _, name: name in chosen, device=device)


def quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the matrices, by name, of a base model's attention blocks that can be quantized."""
    blocks = family_of(model).blocks
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not blocks.fullmatch(name):
            continue
        if module.in_features % GROUP == 0:
            yield name, module


def check_quantizer(how: str, device: str) -> None:
    """Raise SettingError unless torchao can quantize and multiply a matrix on `device`.

    A small matrix is multiplied to find out.
    """
    try:
        from torchao.quantization import quantize_

        config = QUANTIZERS[how]()
    except ImportError as error:
        raise SettingError(
            f"quantize = {how!r} needs torchao: pip install 'imprompt[quantized]' "
            f"({first_line(error)})"
        ) from error
    try:
        matrix = nn.Linear(GROUP, 1, device=device, dtype=torch.float16).requires_grad_(False)
        quantize_(matrix, config)
        matrix(torch.ones(1, GROUP, device=device, dtype=torch.float16)).item()
    except Exception as error:  # a device can fail in any way
        others = " or ".join(repr(name) for name in QUANTIZERS if name != how)
        raise SettingError(
            f"quantize = {how!r} does not work on {device} ({first_line(error)}): try {others}"
        ) from error


def visit(module: nn.Module, device: str) -> None:
    """Keep a module's weights in main memory except during its forward pass.

    Its output stays on `device`.
    """
    from accelerate import cpu_offload_with_hook

    _, hook = cpu_offload_with_hook(module, torch.device(device))
    module.register_forward_hook(lambda *_: hook.offload(), always_call=True)
