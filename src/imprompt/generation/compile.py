"""Compile the base model's forward pass as one graph that new prompts, scales and masks reuse.

A new seed reuses it too. The hook that prepares image prompts (`imprompt.attention.injection`)
stays outside the graph, so the graph projects queries only. Compiled code is kept on disk: a second
start reads it.
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._pytree import tree_map_only

from imprompt.errors import SettingError
from imprompt.families.base import family_of, positional_names
from imprompt.files import cache_root
from imprompt.prompt import KEY

# PyTorch's variable; its default is a folder of /tmp, which is lost at the next boot
CACHE = "TORCHINDUCTOR_CACHE_DIR"
GRAPHS = 64
MISSING = {  # PyTorch's error -> what compiling needs, and what to do
    "InvalidCxxCompiler": "a C++ compiler, and none was found: install g++",
    "CppCompileError": "a C++ compiler with Python's headers: install g++ and python3-dev",
    "TritonMissing": "Triton, and it is not installed: pip install triton",
}
WITHOUT = {  # how a class compiles that cannot be one graph -> what a user can compile
    "blocks": "each of its blocks",
    "parts": "it, without fullgraph,",
}


def compile_base(model: nn.Module, **options: Any) -> None:
    """Compile the forward pass of `model` at its first call; `options` as for `torch.compile`.

    On a GPU it runs as CUDA graphs. Another size, batch or number of prompts is compiled again, at
    most GRAPHS times; after that it runs uncompiled. Raise SettingError if the class cannot be one
    graph, or, at that first call, where compiling is not possible.
    """
    family = family_of(model)
    if family.compiles != "whole":
        raise SettingError(
            f"a {type(model).__name__} cannot be compiled as one graph: leave compile out, or call "
            f"torch.compile on {WITHOUT[family.compiles]} yourself"
        )
    if os.environ.get(CACHE) in (None, default_cache_dir()):  # PyTorch writes its own choice there
        os.environ[CACHE] = str(cache_root() / "compiled")
    graphs = next(model.parameters()).device.type == "cuda"
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    forward: Any = model.forward
    latents, names = family.arguments[0], positional_names(model)
    chosen: dict[str, Any] = ({"mode": "reduce-overhead"} if graphs else {}) | options
    run = torch.compile(forward, fullgraph=True, **chosen)

    @functools.wraps(forward)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        channel = kwargs.get(family.channel) or {} if family.channel else {}
        if getattr(channel.get(KEY), "undecided", False):
            # the layers time kernels first, which is not possible inside a graph
            return forward(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        # some pipelines use another memory layout, which would compile a new graph
        given[latents] = tree_map_only(Tensor, Tensor.contiguous, given[latents])
        try:
            out = run(**given)
        except FailOnRecompileLimitHit:
            return forward(*args, **kwargs)
        except TorchDynamoException as error:
            if needed := MISSING.get(type(getattr(error, "inner_exception", None)).__name__):
                raise SettingError(f"compiling needs {needed}, or turn compiling off") from error
            raise
        # the next run of a CUDA graph overwrites the output of this one
        return tree_map_only(Tensor, Tensor.clone, out) if graphs else out

    model.forward = compiled
